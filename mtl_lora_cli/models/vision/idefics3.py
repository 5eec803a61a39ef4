"""Idefics 3 and SmolVLM: a picture as tiles in rows and columns, and once as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.vision import Seen, Vision, vision


@vision("idefics3", "smolvlm")
class Idefics3(Vision):
    """See the module and `Vision`.

    A tile has (S / patch)² / factor² tokens, S its side; behind the tiles stands the whole picture at that side.
    """

    connector: ClassVar = "connector"

    def __init__(
        self, base: BaseModel, config: Any, tokenizer: Any, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(base, config, tokenizer, size)
        side = int(self.processor.max_image_size["longest_edge"])
        patches = (side // config.vision_config.patch_size) ** 2
        self._tile = int(patches / config.scale_factor**2)
        self._around = getattr(tokenizer, "fake_image_token", "<fake_token_around_image>")
        self._whole = getattr(tokenizer, "global_image_token", "<global-img>")

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles; 0 and 0: the whole picture alone."""
        _, rows, columns = self.processor.get_number_of_image_patches(height, width)
        return int(rows), int(columns)

    def count(self, height: int, width: int) -> int:
        """See `Vision`."""
        rows, columns = self._grid(height, width)
        return (rows * columns + 1) * self._tile

    def text(self, height: int, width: int) -> str:
        """See `Vision`."""
        rows, columns = self._grid(height, width)
        tile = self.token * self._tile
        lines = [
            "".join(f"{self._around}<row_{r + 1}_col_{c + 1}>{tile}" for c in range(columns)) + "\n"
            for r in range(rows)
        ]
        whole = f"{self._around}{self._whole}{tile}{self._around}"
        return f"{''.join(lines)}\n{whole}" if rows and columns else whole

    def look(self, picture: Image.Image) -> dict[str, Tensor]:
        """See `Vision`: tiles [n, 3, S, S] and which of their pixels are the picture's, [n, S, S]."""
        found = self.processor(images=[[picture]], return_tensors="pt")
        seen = {name: found[name][0] for name in ("pixel_values", "pixel_attention_mask")}
        wanted = self.count(picture.height, picture.width) // self._tile
        if len(seen["pixel_values"]) != wanted:
            raise UsageError(
                f"base_model: '{self.base.name}': its image processor makes {len(seen['pixel_values'])} tiles of a "
                f"picture of {picture.height} x {picture.width}, expected {wanted}"
            )
        return seen

    @staticmethod
    def join(many: Sequence[Seen]) -> dict[str, Tensor]:
        """See `Vision`: as the pictures of one row, [1, n, …]."""
        return {name: torch.cat([one[name] for one in many])[None] for name in many[0]}
