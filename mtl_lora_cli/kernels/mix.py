"""The small product that differs from position to position: u_i = M_{slot(i)} z_i.

Several layers that share an input lie side by side (j = 1…J), each with matrices of its own. Only
the matrix of a position's own slot is read, so infinities of one task reach no other, and the cost
does not grow with the number of tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton


def mix(
    z: Tensor, mixing: Tensor, slot: Tensor, *, transposed: bool = False, out: Tensor | None = None
) -> Tensor:
    """u_ij = M_{j,slot(i)} z_ij, or with M's transpose; 0 where slot(i) is −1.

    Args:
        z: [N, J·k]; with `transposed` [N, J·m].
        mixing: M [J, P, m, k].
        slot: int32 [N], in [−1, P).
        transposed: multiply by Mᵀ.
        out: where to write; its rows may lie apart.

    Returns:
        [N, J·m], z's dtype; with `transposed` [N, J·k].
    """
    if in_triton(z):
        from mtl_lora_cli.kernels import triton_mix

        return triton_mix.mix(z, mixing, slot, transposed=transposed, out=out)
    layers, slots = mixing.shape[:2]
    matrices = mixing.transpose(2, 3) if transposed else mixing
    rows, columns = matrices.shape[2:]
    place = slot.clamp(min=0).long()
    everywhere = torch.arange(len(slot), device=z.device)
    active = (slot >= 0).unsqueeze(1)
    parts = []
    for own, part in zip(matrices.to(z.dtype), z.split(columns, dim=1), strict=True):
        if slots == 1:
            chosen = part @ own[0].T
        else:
            every = (part @ own.reshape(-1, columns).T).view(-1, slots, rows)
            chosen = every[everywhere, place]
        parts.append(torch.where(active, chosen, 0.0))
    u = parts[0] if layers == 1 else torch.cat(parts, dim=1)
    return u if out is None else out.copy_(u)


def mix_gradient(du: Tensor, z: Tensor, slot: Tensor, slots: int, layers: int) -> Tensor:
    """dM_{j,p} = Σ_{i: slot(i) = p} du_ij z_ijᵀ.

    Args:
        du: [N, J·m].
        z: [N, J·k].
        slot: int32 [N].
        slots: P.
        layers: J.

    Returns:
        [J, P, m, k], float32 (float64 for float64 inputs).
    """
    if in_triton(z):
        from mtl_lora_cli.kernels import triton_mix

        return triton_mix.mix_gradient(du, z, slot, slots, layers)
    rows, columns = du.shape[1] // layers, z.shape[1] // layers
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    active = (slot >= 0).unsqueeze(1)
    du, z = (torch.where(active, t, 0.0).to(wide) for t in (du, z))
    place = slot.clamp(min=0).long()
    everywhere = torch.arange(len(slot), device=z.device)
    parts = []
    for gradient, own in zip(du.split(rows, dim=1), z.split(columns, dim=1), strict=True):
        spread = gradient
        if slots > 1:
            spread = gradient.new_zeros(len(slot), slots, rows)
            spread[everywhere, place] = gradient
        parts.append((spread.reshape(len(slot), -1).T @ own).view(slots, rows, columns))
    return torch.stack(parts)
