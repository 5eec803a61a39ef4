"""A product of low rank added to a matrix in place:  Y ← Y + U Vᵀ,  U [N, k] and V [p, k] with a small k.

Of queries, keys and values it is one with their rotation: q and k are read and written once.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton
from mtl_lora_cli.kernels.rotary import Turn, rotate_

MOST = 128  # of k, in our kernel
_HALF = (torch.bfloat16, torch.float16)


def add_product_(y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Y ← Y + U Vᵀ; sums in float32 or better, rounded once.

    Args:
        y: [N, p]; its rows may lie apart.
        u: [N, k], and v: [p, k]: wherever their values lie.

    Returns:
        y.
    """
    if _ours(y, u.shape[1]):
        from mtl_lora_cli.kernels import triton_low_rank

        return triton_low_rank.add_product_(y, u, v)
    return y.addmm_(u, v.T)


def add_and_turn_(
    qkv: Tensor, u: Tensor, v: Tensor, turn: Turn, *, heads: int, key_heads: int
) -> Tensor:
    """[q | k | v] ← [q | k | v] + U Vᵀ, and then q and k turned (`rotary.rotate_`).

    Args:
        qkv: [N, (H + 2G) D].
        u: [N, 3m], of q, of k and of v.
        v: [(H + 2G) D, 3m], block-diagonal.
        turn, heads, key_heads: see `rotary.rotate_`.

    Returns:
        qkv.
    """
    dim, width = qkv.shape[1] // (heads + 2 * key_heads), u.shape[1] // 3
    if _ours(qkv, width) and not turn.pairs and 2 * turn.cos.shape[1] == dim:
        from mtl_lora_cli.kernels import triton_low_rank

        return triton_low_rank.add_and_turn_(qkv, u, v, turn, heads=heads, key_heads=key_heads)
    ends = (0, heads * dim, (heads + key_heads) * dim, qkv.shape[1])
    parts = zip(pairwise(ends), u.chunk(3, dim=1), v.chunk(3, dim=1), strict=True)
    for (start, stop), own, block in parts:
        add_product_(qkv[:, start:stop], own, block[start:stop])
    return rotate_(qkv, turn, heads=heads, key_heads=key_heads)


def _ours(y: Tensor, rank: int) -> bool:
    """Whether our kernel computes it."""
    return in_triton(y) and rank <= MOST and (y.dtype in _HALF or not y.is_cuda)
