"""LLaVA-NeXT: a picture as a whole and as tiles, and behind each row of its patches a token for the line's end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.vision import KEPT, Features, Seen, Vision, vision


@vision("llava_next")
class LlavaNext(Vision):
    """See the module and `Vision`.

    A tile has (S / patch)² tokens, S its side. Of the tiles together those stay that are no filling, and each of
    their rows has one more.
    """

    beside: ClassVar = ("image_sizes",)

    def __init__(
        self, base: BaseModel, config: Any, tokenizer: Any, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(base, config, tokenizer, size)
        self._side = int(config.vision_config.image_size)
        self._patches = self._side // int(config.vision_config.patch_size)

    def count(self, height: int, width: int) -> int:
        """See `Vision`."""
        from transformers.image_processing_utils import select_best_resolution

        chosen = select_best_resolution((height, width), self.config.image_grid_pinpoints)
        rows, columns = (side // self._side * self._patches for side in chosen)
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        return self._patches**2 + rows * (columns + 1)

    def look(self, picture: Image.Image) -> dict[str, Tensor]:
        """See `Vision`: tiles [n, 3, S, S], the whole first, and the picture's own sides [1, 2]."""
        found = self.processor(images=[picture], return_tensors="pt")
        return {
            "pixel_values": found["pixel_values"][0],
            "image_sizes": torch.as_tensor(found["image_sizes"]),
        }

    @classmethod
    def connected(cls, body: Any, levels: Sequence[Tensor], many: Sequence[Seen]) -> Features:
        """See `Vision`."""
        (level,) = levels
        tiles = body.multi_modal_projector(level).split([len(one[f"{KEPT}.0"]) for one in many])
        found, _ = body.pack_image_features(
            tiles,
            torch.cat([one["image_sizes"] for one in many]),
            vision_feature_select_strategy=body.config.vision_feature_select_strategy,
            image_newline=body.image_newline,
        )
        return Features(torch.cat(list(found)))
