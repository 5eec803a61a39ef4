"""The gradient of many small matrices, M of each expert and task, from pairs sorted by their experts.

    dM_p = Σ_{s: slot(s) = p} du_s z_sᵀ        p = expert · P + task

`mix.py` makes a partial sum of every slot for each chunk of positions, which of so many slots would take
gigabytes. Here the pairs of a slot stand among those of its expert, and each slot is summed alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton


def pair_mix_gradient(du: Tensor, z: Tensor, slot: Tensor, ends: Tensor, slots: int) -> Tensor:
    """dM [slots, m, k], float32 (float64 for float64 inputs); always summed in the same order.

    Args:
        du: [S, m], z: [S, k], of pairs sorted by expert.
        slot: int32 [S], p of each pair, or −1.
        ends: int32 [E], where each expert's pairs end.
        slots: E · P.
    """
    if in_triton(z):
        from mtl_lora_cli.kernels import triton_pair_mix

        return triton_pair_mix.pair_mix_gradient(du, z, slot, ends, slots)
    wide = torch.promote_types(z.dtype, torch.float32)
    du = torch.where((slot >= 0).unsqueeze(1), du, 0.0).to(wide)
    each = du.unsqueeze(2) * z.to(wide).unsqueeze(1)
    found = torch.zeros(slots, du.shape[1], z.shape[1], dtype=wide, device=z.device)
    return found.index_add_(0, slot.clamp(min=0).long(), each)
