"""LLaVA: every picture at one size, a token a patch."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.vision import Vision, features, vision


@vision("llava")
class Llava(Vision):
    """See the module and `Vision`."""

    def __init__(
        self, base: BaseModel, config: Any, tokenizer: Any, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(base, config, tokenizer, size)
        self._sides = fixed_size(self)

    def resize(self, height: int, width: int) -> None:
        """See `Vision`: all of a picture at this size.

        Raises:
            UsageError: the tower takes pictures of its own size alone.
        """
        self.processor.size = {"height": height, "width": width}
        self.processor.do_center_crop = False
        try:
            tokens_at(self.base, (height, width))
        except (ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())[:200]
            raise UsageError(f"images.size: {height} x {width}: {said}") from None

    @cached_property
    def _tokens(self) -> int:
        return tokens_at(self.base, self._sides)

    def count(self, height: int, width: int) -> int:
        """See `Vision`: the same for all."""
        return self._tokens


def fixed_size(own: Vision) -> tuple[int, int]:
    """Height and width that an image processor gives every picture.

    Raises:
        UsageError: they depend on the picture.
    """
    processor = own.processor
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    height, width = size.get("height"), size.get("width")
    if height is None or width is None:
        raise UsageError(
            f"base_model: '{own.base.name}': its pictures keep their proportions (size: {dict(size)}); a "
            f"{own.config.model_type} is known here with one size for all"
        )
    return int(height), int(width)


def tokens_at(base: BaseModel, sides: tuple[int, int]) -> int:
    """Picture tokens of a picture: what the model itself makes of one, asked without a weight."""
    from mtl_lora_cli.models.load import skeleton

    model = skeleton(base)
    with torch.device("meta"), torch.no_grad():
        seen = {"pixel_values": torch.zeros(1, 3, *sides)}
        return len(features(model, seen, model.dtype).tokens)
