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

_CARDS = ("cuda", "meta")  # what is counted without numbers is a card's
_FEW = 8  # channels below which maps lie one below the other, not side by side
Weights = tuple[
    Tensor, tuple[Tensor, ...]
]  # [R_h1 | R_h2 | …] [H, Σ h_i], and of each map R_wi [W, w_i]


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, C, h, w] → [N, C, H, W], bilinear; float32 of half precision."""
    found = summed([x], size, wide=True)
    return found if found.dtype == torch.float64 else found.float()


def summed(maps: Sequence[Tensor], size: tuple[int, int], *, wide: bool = False) -> Tensor:
    """Σ_i of maps [N, C, h_i, w_i], each resized to [N, C, H, W], bilinear.

    Products are used on a card, where their weights are what the dtype can hold: of bfloat16 at twice, four and
    eight times the size.

    Args:
        maps: where nothing is learned, the sum may be written over one of them that has the size already.
        size: H and W.
        wide: it may be given in float32.
    """
    large = [one for one in maps if tuple(one.shape[-2:]) == tuple(size)]
    small = [one for one in maps if tuple(one.shape[-2:]) != tuple(size)]
    if small and small[0].device.type in _CARDS:
        weights = weights_of(small, size)
        if weights is not None:
            onto = sum(large[1:], large[0]) if large else None
            return by_products(small, weights, onto, wide=wide)
    large += [F.interpolate(one, size=size, mode="bilinear", align_corners=False) for one in small]
    return sum(large[1:], large[0])


def by_products(
    maps: Sequence[Tensor], weights: Weights, onto: Tensor | None = None, *, wide: bool = False
) -> Tensor:
    """onto + Σ_i R_hi X_i R_wiᵀ, [N, C, H, W], of X_i [N, C, h_i, w_i].

    First each row is made as wide as it will be; then one product makes all of them, below each other, as tall.
    With many channels the result lies in memory as [N, H, W, C]. See `summed` for `wide` and what becomes of `onto`.
    """
    tall, across = weights
    count, channels = maps[0].shape[:2]
    side_by_side = channels >= _FEW
    widened = [_widened(x, own, side_by_side) for x, own in zip(maps, across, strict=True)]
    rows = widened[0] if len(widened) == 1 else torch.cat(widened, dim=1)
    each = tall.expand(len(rows), -1, -1)
    below = None
    if onto is not None:
        below = onto.permute(0, 2, 3, 1) if side_by_side else onto.flatten(0, 1)
        below = below.reshape(len(rows), len(tall), -1)
    found = _product(each, rows, below, wide=wide)
    if not side_by_side:
        return found.unflatten(0, (count, channels))
    return found.view(count, len(tall), -1, channels).permute(0, 3, 1, 2)


def _product(a: Tensor, b: Tensor, onto: Tensor | None, *, wide: bool) -> Tensor:
    """onto + a b of each; where nothing is learned without a copy of what is large."""
    learned = torch.is_grad_enabled()
    if onto is not None:
        return torch.baddbmm(onto, a, b) if learned else onto.baddbmm_(a, b)
    if wide and not learned and b.is_cuda and b.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b)


def _widened(x: Tensor, wide: Tensor, side_by_side: bool) -> Tensor:
    """X R_wᵀ of x [N, C, h, w]: [N, h, W C], or, one below the other, [N C, h, W]."""
    count, channels, height, width = x.shape
    if not side_by_side:
        return x.reshape(count * channels, height, width) @ wide.T
    rows = x.permute(0, 2, 3, 1).reshape(count * height, width, channels)
    return torch.bmm(wide.expand(len(rows), -1, -1), rows).view(count, height, -1)


def weights_of(maps: Sequence[Tensor], size: tuple[int, int]) -> Weights | None:
    """[R_h1 | R_h2 | …] and each R_wi for maps [N, C, h_i, w_i]; None where their dtype cannot hold them."""
    sides = tuple((int(one.shape[-2]), int(one.shape[-1])) for one in maps)
    return _weights(sides, (size[0], size[1]), maps[0].dtype, maps[0].device)


@lru_cache(maxsize=32)
def _weights(
    sides: tuple[tuple[int, int], ...],
    size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Weights | None:
    with torch.inference_mode(False):
        exact = [torch.cat([_exact(height, size[0]) for height, _ in sides], dim=1)]
        exact += [_exact(width, size[1]) for _, width in sides]
        found = [one.to(dtype) for one in exact]
        wide_enough = dtype in (torch.float32, torch.float64)
        if not wide_enough and any(
            not torch.equal(one.double(), right) for one, right in zip(found, exact, strict=True)
        ):
            return None
        tall, *wide = (one.contiguous().to(device) for one in found)
        return tall, tuple(wide)


def _exact(before: int, after: int) -> Tensor:
    """R [after, before]: what interpolation makes of each unit vector."""
    one = torch.eye(before, dtype=torch.float64)[:, None]
    return F.interpolate(one, size=after, mode="linear", align_corners=False)[:, 0].T
