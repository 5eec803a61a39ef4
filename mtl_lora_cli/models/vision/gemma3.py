"""Gemma 3: every picture at one size, 256 tokens that see each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.vision import Seen, Vision, runs_of, vision


@vision("gemma3")
class Gemma3(Vision):
    """See the module and `Vision`."""

    around: ClassVar = ("boi_token_index", "eoi_token_index")

    def __init__(
        self, base: BaseModel, config: Any, tokenizer: Any, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(base, config, tokenizer, size)
        if getattr(self.processor, "do_pan_and_scan", False):
            raise UsageError(
                f"base_model: '{base.name}': do_pan_and_scan, pictures in crops, is not supported; set it to false in "
                "preprocessor_config.json"
            )

    def count(self, height: int, width: int) -> int:
        """See `Vision`."""
        return int(self.config.mm_tokens_per_image)

    @property
    def mark(self) -> str:
        """See `Vision`."""
        return self.begin

    def text(self, height: int, width: int) -> str:
        """See `Vision`."""
        return f"\n\n{super().text(height, width)}\n\n"

    def look(self, picture: Image.Image) -> dict[str, Tensor]:
        """See `Vision`."""
        found = self.processor(images=[picture], return_tensors="pt")
        return {"pixel_values": found["pixel_values"]}

    @classmethod
    def alone(cls, many: Sequence[Seen], shown: Tensor, prompt: int) -> dict[str, Tensor]:
        """See `Vision`."""
        return {**cls.join(many), "token_type_ids": shown.long()}

    def blocks(
        self, ids: Tensor, bounds: Sequence[tuple[int, int]], prompts: Sequence[int]
    ) -> Tensor | None:
        """See `Vision`: each picture is one."""
        shown = ids == self.token_id
        return runs_of(shown) if bool(shown.any()) else None
