"""Triton kernel of `low_rank.py`: a program a block of Y, which it reads and writes once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 64, 128


@triton.jit
def _adapter_add(
    y, u, v, rows, columns, rank, y_stride, u_stride, u_step, v_stride, v_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    along = tl.arange(0, RANK)
    place = y + row * y_stride + column
    inside = (row < rows) & (column < columns)
    value = tl.load(place, mask=inside, other=0.0)
    left = tl.load(
        u + row * u_stride + along[None, :] * u_step,
        mask=(row < rows) & (along < rank)[None, :],
        other=0.0,
    )
    right = tl.load(
        v + column * v_stride + along[:, None] * v_step,
        mask=(column < columns) & (along < rank)[:, None],
        other=0.0,
    )
    value = value.to(tl.float32) + tl.dot(left, right)
    tl.store(place, value.to(y.dtype.element_ty), mask=inside)


def add_product_(y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """See `low_rank.add_product_`; the columns of y stand beside each other."""
    (rows, columns), rank = y.shape, u.shape[1]
    if rows:
        grid = (triton.cdiv(columns, _COLUMNS), triton.cdiv(rows, _ROWS))
        _adapter_add[grid](
            y, u, v, rows, columns, rank, y.stride(0), *u.stride(), *v.stride(),
            ROWS=_ROWS, COLUMNS=_COLUMNS, RANK=max(16, triton.next_power_of_2(rank)), num_warps=4,
        )  # fmt: skip
    return y
