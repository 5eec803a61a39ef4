"""Products of sorted rows, each run of rows with a matrix of its own.

y_s = W_e x_s,   or with `transposed`   y_s = W_eᵀ x_s,     e the group of row s
P_e = Σ_{s in e} a_s b_sᵀ
"""

from __future__ import annotations

from collections.abc import Iterable

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
    if _on_card(x, x.shape[1], *weights.shape[1:]):
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


def grouped_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """The sum of the outer products of each group's rows, aᵀ b.

    Args:
        a: [S, p]; rows of one group stand together.
        b: [S, q].
        ends: as for `grouped`.

    Returns:
        [E, p, q], float32 or better; on a card in bfloat16 each sum is rounded to that once.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    if _on_card(a, a.shape[1], b.shape[1]):
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        found = torch._grouped_mm(a.contiguous().T, b.contiguous(), offs=ends).to(wide)
        return torch.where((counts > 0)[:, None, None], found, 0.0)
    out = torch.zeros(len(ends), a.shape[1], b.shape[1], dtype=wide, device=a.device)
    start = 0
    for number, end in enumerate(ends.tolist()):
        if end > start:
            out[number] = (a[start:end].T @ b[start:end]).to(wide)
        start = end
    return out


def _on_card(x: Tensor, *sides: int) -> bool:
    return x.is_cuda and together(x.dtype, sides)


def together(dtype: torch.dtype, sides: Iterable[int]) -> bool:
    """Whether torch's grouped product on a card takes matrices with these sides: rows of whole 16 bytes."""
    return dtype == torch.bfloat16 and all(side % 8 == 0 for side in sides)
