"""One autograd function for a frozen projection and its adapter.

For a position of task t, with z = A x:

    y = W x + b + s · B_cat M_t z       M_t = [g_{t,1} Λ_t; …; g_{t,n} Λ_t]  [n·r, r]

(arXiv 2410.09437, regrouped; see docs/method.md). The function keeps the input, z, and the
Parameter of the frozen weight, never a view or an expanded copy of it: 4-bit bytes can then be
released between the passes. It computes no gradient for the frozen weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_lora_cli.adapters.routing import Slots


def dense_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] as numbers: itself, or a 4-bit bitsandbytes weight expanded."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.to(dtype)
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(weight.data, state).to(dtype)


def route(z: Tensor, mixing: Tensor, slots: Slots) -> Tensor:
    """u_i = M_{task(i)} z_i, and 0 where the base model alone counts.

    Every position is multiplied by the matrices of all tasks present (a tiny product), and its own
    is then *chosen*, not summed with zeros: infinities of one task reach no other.

    Args:
        z: [N, r].
        mixing: M, [P, k, r], one matrix a task present.
        slots: the routing of the N positions.

    Returns:
        [N, k], same dtype as z.
    """
    tasks, size, _ = mixing.shape
    if tasks == 1:
        u = z @ mixing[0].T
    else:
        every = (z @ mixing.reshape(tasks * size, -1).T).view(-1, tasks, size)
        u = every[torch.arange(z.shape[0], device=z.device), slots.slot]
    return u if slots.active is None else torch.where(slots.active, u, 0.0)


def _mixing_gradient(u_gradient: Tensor, z: Tensor, slots: Slots) -> Tensor:
    """dM_t = Σ_{i of task t} du_i z_iᵀ, [P, k, r]."""
    positions, size = u_gradient.shape
    if slots.active is not None:
        u_gradient = torch.where(slots.active, u_gradient, 0.0)
    if slots.count == 1:
        return (u_gradient.T @ z).unsqueeze(0)
    spread = u_gradient.new_zeros(positions, slots.count, size)
    spread[torch.arange(positions, device=z.device), slots.slot] = u_gradient
    return (spread.view(positions, -1).T @ z).view(slots.count, size, -1)


class AdaptedLinear(torch.autograd.Function):
    """y = W x + b + s · B_cat M_{task} A (mask ⊙ x), for flattened positions.

    Shapes: x [N, in], weight [out, in] (or 4-bit), bias [out] or None, down [r, in],
    up [n, out, r], mixing [P, n·r, r], mask [N, in] or None (dropout, already divided by 1 − p).
    All of x's dtype. Returns [N, out].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        mixing: Tensor,
        slots: Slots,
        scale: float,
        mask: Tensor | None,
    ) -> Tensor:
        y = F.linear(x, dense_weight(weight, x.dtype), bias)
        z = (x if mask is None else x * mask) @ down.T
        u = route(z, mixing, slots)
        y.addmm_(u, _stacked(up).T, alpha=scale)
        ctx.save_for_backward(x, weight, down, up, mixing, z, mask)
        ctx.slots, ctx.scale = slots, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, mixing, z, mask = ctx.saved_tensors
        slots: Slots = ctx.slots
        du = ctx.scale * (dy @ _stacked(up))
        dz = route(du, mixing.transpose(1, 2), slots)
        dx = ddown = dup = dmixing = None
        if ctx.needs_input_grad[0]:
            dx = dy @ dense_weight(weight, dy.dtype)
            if mask is None:
                dx.addmm_(dz, down)
            else:
                dx.addcmul_(dz @ down, mask)
        if ctx.needs_input_grad[3]:
            ddown = dz.T @ (x if mask is None else x * mask)
        if ctx.needs_input_grad[4]:
            n, out, rank = up.shape
            u = route(z, mixing, slots)
            dup = (ctx.scale * (dy.T @ u)).view(out, n, rank).permute(1, 0, 2)
        if ctx.needs_input_grad[5]:
            dmixing = _mixing_gradient(du, z, slots)
        return dx, None, None, ddown, dup, dmixing, None, None, None


def _stacked(up: Tensor) -> Tensor:
    """B_cat [out, n·r]: the up-projections [n, out, r] side by side."""
    return up.permute(1, 0, 2).reshape(up.shape[1], -1)
