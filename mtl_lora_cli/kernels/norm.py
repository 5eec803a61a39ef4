"""RMS normalisation of a residual stream, with the addition before it and after its gradient.

    x' = x + δ        r_i = (mean_j x'_ij² + ε)^(-1/2)        h = w ⊙ (r x')

Source: RMSNorm (arXiv 1910.07467) as LLaMA uses it. The weight w is frozen. Where it is of a wider dtype
than x, as 1 + w is for Gemma, h is rounded after the product with it, else before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton, with_room


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, *, room: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x' = x + δ and its normalised form.

    Args:
        x: [N, d], the residual stream.
        delta: [N, d], what the block before adds to it, or None for nothing.
        weight: w [d].
        eps: ε.
        room: columns to leave free behind those of h.

    Returns:
        x' [N, d] (x itself where delta is None), h [N, d + room], both of x's dtype, and r [N]
        float32 (x's dtype where that is wider).
    """
    if in_triton(x):
        from mtl_lora_cli.kernels import triton_norm

        total, made, inverse = triton_norm.add_norm(x, delta, weight, eps, room)
        return total, made.whole(), inverse
    total = x if delta is None else x + delta
    wide = total.to(_wide(total))
    inverse = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    normed = weighted(wide * inverse[:, None], weight, x.dtype)
    return total, with_room(normed, room), inverse


def apply_norm(x: Tensor, inverse: Tensor, weight: Tensor, *, room: int = 0) -> Tensor:
    """h again [N, d + room], from x' and r: what a backward pass recomputes instead of keeping."""
    if in_triton(x):
        from mtl_lora_cli.kernels import triton_norm

        return triton_norm.apply_norm(x, inverse, weight, room).whole()
    unit = x.to(inverse.dtype) * inverse[:, None]
    return with_room(weighted(unit, weight, x.dtype), room)


def weighted(unit: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """w ⊙ x̂ in a dtype; see the module for where it is rounded."""
    if weight.dtype == dtype:
        return weight * unit.to(dtype)
    return (weight * unit).to(dtype)


def norm_gradient(
    dh: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    inverse: Tensor,
    weight: Tensor,
    *,
    room: int = 0,
) -> Tensor:
    """The gradient of x' from that of h, with the one that comes past the norm added.

    With x̂ = r x':  dx' = r (w dh − x̂ mean(w dh x̂)) + dresidual.

    Args:
        dh: [N, d].
        dresidual: [N, d], or None for zero; rows may lie apart.
        x: x' [N, d].
        inverse: r [N].
        weight: w [d].
        room: columns to leave free behind those of the result.

    Returns:
        [N, d + room], x's dtype.
    """
    if in_triton(x):
        from mtl_lora_cli.kernels import triton_norm

        return triton_norm.norm_gradient(dh, dresidual, x, inverse, weight, room).whole()
    unit = x.to(inverse.dtype) * inverse[:, None]
    dunit = weight.to(inverse.dtype) * dh.to(inverse.dtype)
    gradient = inverse[:, None] * (dunit - unit * (dunit * unit).mean(-1, keepdim=True))
    if dresidual is not None:
        gradient = gradient + dresidual.to(inverse.dtype)
    return with_room(gradient.to(x.dtype), room)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
