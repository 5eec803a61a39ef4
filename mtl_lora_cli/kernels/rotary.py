"""Rotary position embedding, in place, on the fused buffer [q | k | v].

    x' = [x₁ cos − x₂ sin, x₂ cos + x₁ sin]    for the halves x₁, x₂ of each head of q and k

(RoFormer, arXiv 2104.09864, in the halves of LLaMA.) The gradient is the rotation by −θ. With fewer than
D/2 angles only the first columns of a head turn; the others stay. With `pairs`, x₁ and x₂ are not halves
but neighbours: columns 2i and 2i + 1 turn by angle i, as for GLM.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton

_ROWS = 256  # at once: what a core's own cache holds


class Turn(NamedTuple):
    """The rotation of each position.

    Attributes:
        cos, sin: [N, R/2] with R ≤ D, float32 or better.
        pairs: neighbours turn together, not halves.
    """

    cos: Tensor
    sin: Tensor
    pairs: bool = False


def rotate_(qkv: Tensor, turn: Turn, *, heads: int, key_heads: int, back: bool = False) -> Tensor:
    """Rotate the first H + G of the buffer's H + 2G heads.

    Args:
        qkv: [N, (H + 2G) D]; rows may lie apart.
        turn: by what.
        heads, key_heads: H and G.
        back: by −θ.

    Returns:
        qkv.
    """
    if in_triton(qkv):
        from mtl_lora_cli.kernels import triton_rotary

        return triton_rotary.rotate_(qkv, turn, heads=heads, key_heads=key_heads, back=back)
    cos, sin = turn.cos, -turn.sin if back else turn.sin
    each = qkv.unflatten(1, (heads + 2 * key_heads, -1))[:, : heads + key_heads]
    each = each[..., : 2 * cos.shape[-1]]
    for rows, c, s in zip(*(x.split(_ROWS) for x in (each, cos, sin)), strict=True):
        _turn_(rows, c.unsqueeze(1), s.unsqueeze(1), pairs=turn.pairs)
    return qkv


def _turn_(each: Tensor, c: Tensor, s: Tensor, *, pairs: bool) -> None:
    wide = each.to(torch.promote_types(each.dtype, c.dtype))
    if pairs:
        first, second = wide[..., ::2], wide[..., 1::2]
        turned = torch.stack([first * c - second * s, second * c + first * s], dim=-1).flatten(-2)
    else:
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    each.copy_(turned)
