"""The small product that differs from position to position: u_i = M_{slot(i)} z_i.

Several layers that share an input lie side by side (j = 1…J), each with matrices of its own. Only
the matrix of a position's own slot is read, so infinities of one task reach no other, and the cost
does not grow with the number of tasks.

A layer may have more columns in z and in u than M has: they fill it up to a size that products like.
Those of z are not read, those of u are 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton
from mtl_lora_cli.kernels.runs import Runs


def mix(
    z: Tensor,
    mixing: Tensor,
    slot: Tensor,
    *,
    transposed: bool = False,
    width: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """u_ij = M_{j,slot(i)} z_ij, or with M's transpose; 0 where slot(i) is −1.

    Args:
        z: [N, J·k'], k' ≥ k; with `transposed` [N, J·m'], m' ≥ m. Its rows may lie apart.
        mixing: M [J, P, m, k].
        slot: int32 [N], in [−1, P).
        transposed: multiply by Mᵀ.
        width: m', with `transposed` k'; None: m, or k.
        out: where to write; its rows may lie apart.

    Returns:
        [N, J·m'], z's dtype; with `transposed` [N, J·k'].
    """
    layers, slots = mixing.shape[:2]
    matrices = mixing.transpose(2, 3) if transposed else mixing
    rows, columns = matrices.shape[2:]
    width = rows if width is None else width
    if in_triton(z):
        from mtl_lora_cli.kernels import triton_mix

        return triton_mix.mix(z, matrices, slot, width=width, out=out)
    own = matrices.to(z.dtype).flatten(1, 2).mT  # [J, k, P·m]
    every = z.unflatten(1, (layers, -1))[..., :columns].transpose(0, 1) @ own
    first = slots * torch.arange(layers * len(z), device=z.device).view(layers, -1)
    place = (first + slot.clamp(min=0)).T.flatten()  # of each position and layer, in [J, N, P]
    chosen = every.view(-1, rows).index_select(0, place).view(len(z), layers, rows)
    chosen = torch.where((slot >= 0).view(-1, 1, 1), chosen, 0.0)
    u = filled_up(chosen, width).flatten(1)
    return u if out is None else out.copy_(u)


def mix_gradient(
    du: Tensor, z: Tensor, slot: Tensor, like: torch.Size, runs: Runs | None = None
) -> Tensor:
    """dM_{j,p} = Σ_{i: slot(i) = p} du_ij z_ijᵀ.

    Args:
        du: [N, J·m'].
        z: [N, J·k'].
        slot: int32 [N].
        like: [J, P, m, k], of M.
        runs: of `slot`, where they are known; kernels then take what the positions take, however many slots there are.

    Returns:
        [J, P, m, k], float32 (float64 for float64 inputs).
    """
    if in_triton(z):
        from mtl_lora_cli.kernels import triton_mix, triton_runs

        if runs is not None:
            return triton_runs.mix_gradient(du, z, runs, like)
        return triton_mix.mix_gradient(du, z, slot, like)
    layers, slots, rows, columns = like
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    active = (slot >= 0).unsqueeze(1)
    du, z = (torch.where(active, t, 0.0).to(wide) for t in (du, z))
    place = slot.clamp(min=0).long()
    everywhere = torch.arange(len(slot), device=z.device)
    parts = []
    for gradient, own in zip(du.chunk(layers, dim=1), z.chunk(layers, dim=1), strict=True):
        gradient, own = gradient[:, :rows], own[:, :columns]
        spread = gradient
        if slots > 1:
            spread = gradient.new_zeros(len(slot), slots, rows)
            spread[everywhere, place] = gradient
        parts.append((spread.reshape(len(slot), -1).T @ own).view(slots, rows, columns))
    return torch.stack(parts)


def of_tasks(z: Tensor, slot: Tensor, active: Tensor | None, out: Tensor | None = None) -> Tensor:
    """z where a position belongs to a task, 0 elsewhere; z itself where all do and no `out` is given.

    Args:
        z: [N, k]; its rows may lie apart.
        slot: int32 [N], −1 of no task.
        active: bool [N, 1], the same; None where all belong to one.
        out: where to write; its rows may lie apart.
    """
    if in_triton(z) and (active is not None or out is not None):
        from mtl_lora_cli.kernels import triton_mix

        return triton_mix.of_tasks(z, slot, out)
    if active is not None:
        z = torch.where(active, z, 0.0)
    return z if out is None else out.copy_(z)


def filled_up(x: Tensor, width: int) -> Tensor:
    """x [..., w] with zeros behind it up to [..., width]."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
