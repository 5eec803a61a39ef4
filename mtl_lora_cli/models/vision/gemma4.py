"""Gemma 4: pictures in their own proportions; in the larger models the tokens of one see each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from PIL import Image
from torch import Tensor

from mtl_lora_cli.models.vision import Seen, Vision, runs_of, vision


@vision("gemma4")
class Gemma4(Vision):
    """See the module and `Vision`."""

    in_windows: ClassVar = True
    connector: ClassVar = "embed_vision"
    around: ClassVar = ("boi_token_id", "eoi_token_id")

    def count(self, height: int, width: int) -> int:
        """See `Vision`: a token is a square of patches."""
        from transformers.models.gemma4.image_processing_pil_gemma4 import (
            get_aspect_ratio_preserving_size,
        )

        own, pool = self.processor, int(self.processor.pooling_kernel_size)
        most = int(own.max_soft_tokens) * pool**2
        sides = get_aspect_ratio_preserving_size(height, width, own.patch_size, most, pool)
        rows, columns = (side // (own.patch_size * pool) for side in sides)
        return int(rows * columns)

    def look(self, picture: Image.Image) -> dict[str, Tensor]:
        """See `Vision`: patches [1, P, values] and their places [1, P, 2]."""
        found = self.processor(images=[picture], return_tensors="pt")
        return {name: found[name] for name in ("pixel_values", "image_position_ids")}

    @classmethod
    def alone(cls, many: Sequence[Seen], shown: Tensor, prompt: int) -> dict[str, Tensor]:
        """See `Vision`."""
        return {**cls.join(many), "mm_token_type_ids": shown.int()}

    def blocks(
        self, ids: Tensor, bounds: Sequence[tuple[int, int]], prompts: Sequence[int]
    ) -> Tensor | None:
        """See `Vision`: each picture is one, where the configuration says so."""
        shown = ids == self.token_id
        if self.config.get_text_config().use_bidirectional_attention != "vision":
            return None
        return runs_of(shown) if bool(shown.any()) else None
