"""Triton kernel of `low_rank.py`: a program some blocks of Y below each other, each read and written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, BLOCKS, WARPS = 64, 128, 2, 4


@triton.jit
def _adapter_add(
    y, u, v, rows, columns, rank, y_stride, u_stride, u_step, v_stride, v_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, RANK: tl.constexpr,
    BESIDE: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    along = tl.arange(0, RANK)
    if BESIDE:  # read as it lies there
        right = tl.load(
            v + column[None, :] + along[:, None] * v_step,
            mask=(column < columns)[None, :] & (along < rank)[:, None],
            other=0.0,
        )
    else:
        right = tl.trans(
            tl.load(
                v + column[:, None] * v_stride + along[None, :] * v_step,
                mask=(column < columns)[:, None] & (along < rank)[None, :],
                other=0.0,
            )
        )
    for block in range(BLOCKS):
        row = (tl.program_id(1) * BLOCKS + block) * ROWS + tl.arange(0, ROWS)
        row = row.to(tl.int64)[:, None]
        place = y + row * y_stride + column[None, :]
        inside = (row < rows) & (column < columns)[None, :]
        value = tl.load(place, mask=inside, other=0.0)
        left = tl.load(
            u + row * u_stride + along[None, :] * u_step,
            mask=(row < rows) & (along < rank)[None, :],
            other=0.0,
        )
        value = value.to(tl.float32) + tl.dot(left, right)
        tl.store(place, value.to(y.dtype.element_ty), mask=inside)


def add_product_(y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """See `low_rank.add_product_`; the columns of y stand beside each other."""
    (rows, columns), rank = y.shape, u.shape[1]
    if rows:
        grid = (triton.cdiv(columns, COLUMNS), triton.cdiv(rows, ROWS * BLOCKS))
        _adapter_add[grid](
            y, u, v, rows, columns, rank, y.stride(0), *u.stride(), *v.stride(),
            ROWS=ROWS, COLUMNS=COLUMNS, BLOCKS=BLOCKS, RANK=max(16, triton.next_power_of_2(rank)),
            BESIDE=v.stride(0) == 1, num_warps=WARPS,
        )  # fmt: skip
    return y
