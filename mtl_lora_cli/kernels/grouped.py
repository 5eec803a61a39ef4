"""Products of sorted rows, each run of rows with a matrix of its own.

y_s = W_e x_s,   or with `transposed`   y_s = W_eᵀ x_s,     e the group of row s
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped(x: Tensor, weights: Tensor, ends: Tensor, *, transposed: bool = False) -> Tensor:
    """One product a group that has rows; on a card in bfloat16 torch's grouped product, which asks nothing back.

    Args:
        x: [S, in], with `transposed` [S, out]; rows of one group stand together.
        weights: W [E, out, in].
        ends: int32 [E], where each group's rows end; the last one is S.
        transposed: multiply by Wᵀ.

    Returns:
        [S, out], with `transposed` [S, in].
    """
    if x.is_cuda and x.dtype == torch.bfloat16:
        matrices = weights if transposed else weights.transpose(1, 2)
        return torch._grouped_mm(x.contiguous(), matrices, offs=ends)
    out = x.new_empty(len(x), weights.shape[2 if transposed else 1])
    start = 0
    for number, end in enumerate(ends.tolist()):
        if end > start:
            rows, weight = x[start:end], weights[number]
            out[start:end] = rows @ weight if transposed else F.linear(rows, weight)
        start = end
    return out
