"""Qwen2.5-VL and Qwen3-VL: pictures in their own proportions, whose tokens have places in two dimensions.

Their rotary embedding has three parts, and features of Qwen3-VL's tower enter several layers (DeepStack).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mtl_lora_cli.models.vision import Seen, Vision, vision


@vision("qwen2_5_vl", "qwen3_vl")
class QwenVL(Vision):
    """See the module and `Vision`."""

    connector: ClassVar = None
    beside: ClassVar = ("image_grid_thw",)
    around: ClassVar = ("vision_start_token_id", "vision_end_token_id")

    def count(self, height: int, width: int) -> int:
        """See `Vision`: a token is a square of patches."""
        patches = self.processor.get_number_of_image_patches(height, width)
        return int(patches) // int(self.processor.merge_size) ** 2

    @property
    def mark(self) -> str:
        """See `Vision`."""
        return f"{self.begin}{self.token}{self.end}"

    @classmethod
    def alone(cls, many: Sequence[Seen], shown: Tensor, prompt: int) -> dict[str, Tensor]:
        """See `Vision`."""
        return {**cls.join(many), "mm_token_type_ids": shown.int()}

    def spread(self, seen: Seen) -> Tensor:
        """See `Vision`: time, height and width, each token a square of patches."""
        side = int(self.config.vision_config.spatial_merge_size)
        time, height, width = seen["image_grid_thw"][0].tolist()
        axes = (torch.arange(n) for n in (time, height // side, width // side))
        return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
