"""InternVL: a picture as tiles of one size, and where there are several, once as a whole behind them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor

from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.vision import Vision, vision
from mtl_lora_cli.models.vision.llava import fixed_size, tokens_at


@vision("internvl")
class InternVL(Vision):
    """See the module and `Vision`."""

    def __init__(
        self, base: BaseModel, config: Any, tokenizer: Any, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(base, config, tokenizer, size)
        self.begin = getattr(tokenizer, "start_image_token", "<img>")
        self.end = getattr(tokenizer, "end_image_token", "</img>")

    @cached_property
    def _tile(self) -> int:
        return tokens_at(self.base, fixed_size(self))

    def count(self, height: int, width: int) -> int:
        """See `Vision`."""
        how = {"crop_to_patches": True}  # as the model's own processor does
        return int(self.processor.get_number_of_image_patches(height, width, how)) * self._tile

    def look(self, picture: Image.Image) -> dict[str, Tensor]:
        """See `Vision`: tiles [n, 3, S, S]."""
        found = self.processor(images=[picture], crop_to_patches=True, return_tensors="pt")
        return {"pixel_values": found["pixel_values"]}
