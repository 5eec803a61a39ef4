"""The gradient of many small matrices, M of each expert and task, from pairs sorted by their experts.

    dM_p = Σ_{s: slot(s) = p} du_s z_sᵀ        p = expert · P + task

`mix.py` makes a partial sum of every slot for each chunk of positions, which of so many slots would take
gigabytes. Here the pairs of a slot stand among those of its expert, and each slot is summed alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton


def pair_mix_gradient(
    du: Tensor, z: Tensor, slot: Tensor, ends: Tensor, like: torch.Size
) -> Tensor:
    """dM [E · P, m, k], float32 (float64 for float64 inputs); always summed in the same order.

    Args:
        du: [S, m'], z: [S, k'], of pairs sorted by expert; columns beyond m and k are not read.
        slot: int32 [S], p of each pair, or −1.
        ends: int32 [E], where each expert's pairs end.
        like: [E · P, m, k].
    """
    slots, rows, columns = like
    if in_triton(z):
        from mtl_lora_cli.kernels import triton_pair_mix

        return triton_pair_mix.pair_mix_gradient(du, z, slot, ends, like)
    wide = torch.promote_types(z.dtype, torch.float32)
    du = torch.where((slot >= 0).unsqueeze(1), du[:, :rows], 0.0).to(wide)
    each = du.unsqueeze(2) * z[:, :columns].to(wide).unsqueeze(1)
    found = torch.zeros(slots, rows, columns, dtype=wide, device=z.device)
    return found.index_add_(0, slot.clamp(min=0).long(), each)
