"""The decoder of a task: a small perceptron over the maps of all stages.

    u = Σ_i up(W_i norm_i(x_i))        y = W_out gelu(conv(gelu(u)))        answer = form(up(y))

x_i [N, h_i, w_i, C_i] are the stages' outputs, `up` is bilinear: to a quarter of the picture's sides, and to the
picture's own in the end; conv is 3 x 3. Each pixel is projected by itself (Xie et al., SegFormer, arXiv
2105.15203); where stages are summed there they are put side by side and projected once more, which is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_lora_cli.dense.resize import resized, summed
from mtl_lora_cli.tasks.maps import MapSpec

WIDTH = 128
_FUSED = 4  # the part of a picture's sides at which stages meet


class Decoder(nn.Module):
    """See the module.

    Args:
        channels: C_i of each stage.
        spec: what the task's map holds.
        width: of u.
    """

    def __init__(self, channels: Sequence[int], spec: MapSpec, width: int = WIDTH) -> None:
        super().__init__()
        self.spec = spec
        self.norms = nn.ModuleList(nn.LayerNorm(count) for count in channels)
        self.projections = nn.ModuleList(nn.Linear(count, width) for count in channels)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, spec.channels, 1)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """x_i [N, h_i, w_i, C_i] of each stage → [N, C, H, W] float32 (float64 of such), see `formed`."""
        fused = (-(-size[0] // _FUSED), -(-size[1] // _FUSED))
        projected = [
            project(norm(x)).permute(0, 3, 1, 2)
            for x, norm, project in zip(maps, self.norms, self.projections, strict=True)
        ]
        y = self.out(F.gelu(self.conv(F.gelu(summed(projected, fused)))))
        return formed(resized(y, size), self.spec)


def formed(y: Tensor, spec: MapSpec) -> Tensor:
    """What a task answers, of its decoder's last layer y [N, C, H, W].

    Depth lies between its least and largest value: low + (high − low) σ(y), or, with `scale: log`,
    low (high / low)^σ(y). Normals are of length 1. Of all else y itself is given: logits.
    """
    if spec.objective == "normals":
        return F.normalize(y, dim=1)
    if spec.objective != "depth":
        return y
    share = torch.sigmoid(y)
    if spec.scale == "log":
        return spec.low * torch.exp(share * math.log(spec.high / spec.low))
    return spec.low + (spec.high - spec.low) * share
