"""RMS normalisation of queries and keys on the fused buffer [q | k | v], and their rotation behind it.

    x̂ = x (mean x² + ε)^(-1/2)        h = R (w ⊙ x̂)        dx = r (w Rᵀdh − x̂ mean(w Rᵀdh x̂))

over each head (w [D]: Qwen3, Gemma 3) or over all heads together (w [H·D]: OLMo 2). R turns by the
position's angles (`rotary.py`), or is left out. r is computed again in the backward pass: that takes one read
of what is read anyway. The weights are frozen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton
from mtl_lora_cli.kernels.norm import weighted
from mtl_lora_cli.kernels.rotary import Turn, rotate_


class HeadNorms(NamedTuple):
    """The norms of one layer's queries and keys.

    Attributes:
        q, k: weights, each as long as what is normed together; it divides H·D or G·D.
        eps: ε.
    """

    q: Tensor
    k: Tensor
    eps: float


def head_norm(
    qkv: Tensor, norms: HeadNorms, turn: Turn | None = None, *, heads: int, key_heads: int
) -> Tensor:
    """[h_q | h_k | v], new memory.

    Args:
        qkv: [N, (H + 2G) D].
        norms: of this layer.
        turn: R of each position; None: nothing turns.
        heads, key_heads: H and G.
    """
    if in_triton(qkv):
        from mtl_lora_cli.kernels import triton_head_norm

        return triton_head_norm.head_norm(qkv, norms, turn, heads=heads, key_heads=key_heads)
    out = torch.empty_like(qkv)
    q, k, v = _widths(qkv, heads, key_heads)
    for weight, x, place in zip(
        norms[:2], qkv.split([q, k, v], 1), out.split([q, k, v], 1), strict=False
    ):
        unit, _ = _unit(x, weight, norms.eps)
        place.copy_(weighted(unit, weight, x.dtype).flatten(1))
    out[:, q + k :].copy_(qkv[:, q + k :])
    return out if turn is None else rotate_(out, turn, heads=heads, key_heads=key_heads)


def head_norm_gradient_(
    dqkv: Tensor,
    qkv: Tensor,
    norms: HeadNorms,
    turn: Turn | None = None,
    *,
    heads: int,
    key_heads: int,
) -> Tensor:
    """The gradient of [q | k | v] from that of [h_q | h_k | v], in its place.

    Args:
        dqkv: [N, (H + 2G) D]; rows may lie apart.
        qkv: what `head_norm` was given.
        norms, turn, heads, key_heads: as there.
    """
    if in_triton(qkv):
        from mtl_lora_cli.kernels import triton_head_norm

        return triton_head_norm.head_norm_gradient_(
            dqkv, qkv, norms, turn, heads=heads, key_heads=key_heads
        )
    if turn is not None:
        rotate_(dqkv, turn, heads=heads, key_heads=key_heads, back=True)
    widths = _widths(qkv, heads, key_heads)
    for weight, x, dh in zip(norms[:2], qkv.split(widths, 1), dqkv.split(widths, 1), strict=False):
        unit, inverse = _unit(x, weight, norms.eps)
        dunit = weight.to(unit.dtype) * dh.unflatten(1, unit.shape[1:]).to(unit.dtype)
        dx = inverse * (dunit - unit * (dunit * unit).mean(-1, keepdim=True))
        dh.copy_(dx.flatten(1))
    return dqkv


def _unit(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x̂ [N, parts, width] and r [N, parts, 1], in float32 or better."""
    wide = x.unflatten(1, (-1, weight.shape[0]))
    wide = wide.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide * inverse, inverse


def _widths(qkv: Tensor, heads: int, key_heads: int) -> list[int]:
    dim = qkv.shape[1] // (heads + 2 * key_heads)
    return [heads * dim, key_heads * dim, key_heads * dim]
