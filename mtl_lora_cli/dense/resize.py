"""Maps at another size, by bilinear interpolation; on a card as two products with small matrices.

    Y = R_h X R_wᵀ        R_h [H, h] has the weights of `F.interpolate(mode="bilinear", align_corners=False)`

The backward pass is two products as well. torch's own adds up gradients one by one and in no fixed order, in
half precision for the most part of a decoder's time, and gives other bits at each run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW = 8  # channels below which maps lie one below the other, not side by side
Weights = tuple[Tensor, Tensor]  # R_h [H, h] and R_w [W, w]


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, C, h, w] → [N, C, H, W], bilinear."""
    return summed([x], size)


def summed(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Σ_i of maps [N, C, h_i, w_i], each resized to [N, C, H, W], bilinear.

    Products are used on a card, where their weights are what the dtype can hold: of bfloat16 at twice, four and
    eight times the size.
    """
    found, smaller, weights = None, [], []
    for one in maps:
        if tuple(one.shape[-2:]) == tuple(size):
            found = one if found is None else found + one
        elif one.is_cuda and (own := weights_of(one, size)) is not None:
            smaller.append(one)
            weights.append(own)
        else:
            large = F.interpolate(one, size=size, mode="bilinear", align_corners=False)
            found = large if found is None else found + large
    if smaller:
        found = by_products(smaller, weights, found)
    assert found is not None, "one map at least"
    return found


def by_products(
    maps: Sequence[Tensor], weights: Sequence[Weights], onto: Tensor | None = None
) -> Tensor:
    """onto + Σ_i R_hi X_i R_wiᵀ, [N, C, H, W], of X_i [N, C, h_i, w_i].

    First each row is made as wide as it will be; then one product makes all of them, below each other, as tall.
    With many channels the result lies in memory as [N, H, W, C].
    """
    tall = torch.cat([own for own, _ in weights], dim=1)
    count, channels = maps[0].shape[:2]
    side_by_side = channels >= _FEW
    rows = torch.cat(
        [_widened(x, wide, side_by_side) for x, (_, wide) in zip(maps, weights, strict=True)], dim=1
    )
    each = tall.expand(len(rows), -1, -1)
    if onto is None:
        found = torch.bmm(each, rows)
    else:
        below = onto.permute(0, 2, 3, 1) if side_by_side else onto.flatten(0, 1)
        found = torch.baddbmm(below.reshape(len(rows), len(tall), -1), each, rows)
    if not side_by_side:
        return found.unflatten(0, (count, channels))
    return found.view(count, len(tall), -1, channels).permute(0, 3, 1, 2)


def _widened(x: Tensor, wide: Tensor, side_by_side: bool) -> Tensor:
    """X R_wᵀ of x [N, C, h, w]: [N, h, W C], or, one below the other, [N C, h, W]."""
    count, channels, height, width = x.shape
    if not side_by_side:
        return x.reshape(count * channels, height, width) @ wide.T
    rows = x.permute(0, 2, 3, 1).reshape(count * height, width, channels)
    return torch.bmm(wide.expand(len(rows), -1, -1), rows).view(count, height, -1)


def weights_of(x: Tensor, size: tuple[int, int]) -> Weights | None:
    """R_h and R_w for x [N, C, h, w]; None where its dtype cannot hold them."""
    tall, wide = (
        _weights(*sides, x.dtype, x.device) for sides in zip(x.shape[-2:], size, strict=True)
    )
    return None if tall is None or wide is None else (tall, wide)


@lru_cache(maxsize=64)
def _weights(before: int, after: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """R [after, before]; None where a dtype of half precision cannot hold it exactly."""
    with torch.inference_mode(False):
        one = torch.eye(before, dtype=torch.float64)[:, None]
        exact = F.interpolate(one, size=after, mode="linear", align_corners=False)[:, 0].T
        found = exact.to(dtype)
        if dtype not in (torch.float32, torch.float64) and not torch.equal(found.double(), exact):
            return None
        return found.contiguous().to(device)
