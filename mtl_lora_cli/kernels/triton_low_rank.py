"""Triton kernels of `low_rank.py`: a program some blocks of Y below each other, each read and written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mtl_lora_cli.kernels.rotary import Turn

ROWS, COLUMNS, BLOCKS, WARPS = 32, 128, 4, 4


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


@triton.jit
def _adapter_rotary(
    y, u, v, cos, sin, rows, rank, half, heads, turned, y_stride, u_stride, u_step, v_stride, v_step,
    angle_stride,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, RANK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    part = (head >= heads).to(tl.int32) + (head >= turned).to(tl.int32)  # q, k or v
    column = tl.arange(0, HALF)
    along = tl.arange(0, RANK)
    there = (column < half)[:, None] & (along < rank)[None, :]
    block_of = v + part * rank * v_step + along[None, :] * v_step
    first = head * 2 * half + column
    above = tl.load(block_of + first[:, None] * v_stride, mask=there, other=0.0)
    below = tl.load(block_of + (first + half)[:, None] * v_stride, mask=there, other=0.0)
    above, below = tl.trans(above), tl.trans(below)
    for block in range(BLOCKS):
        row = (tl.program_id(1) * BLOCKS + block) * ROWS + tl.arange(0, ROWS)
        row = row.to(tl.int64)[:, None]
        place = y + row * y_stride + first[None, :]
        inside = (row < rows) & (column < half)[None, :]
        left = tl.load(
            u + row * u_stride + (part * rank + along)[None, :] * u_step,
            mask=(row < rows) & (along < rank)[None, :],
            other=0.0,
        )
        one = tl.load(place, mask=inside, other=0.0).to(tl.float32) + tl.dot(left, above)
        two = tl.load(place + half, mask=inside, other=0.0).to(tl.float32) + tl.dot(left, below)
        one = one.to(y.dtype.element_ty).to(tl.float32)
        two = two.to(y.dtype.element_ty).to(tl.float32)
        turns = inside & (first < turned * 2 * half)[None, :]
        angle = row * angle_stride + column[None, :]
        c = tl.load(cos + angle, mask=turns, other=1.0)
        s = tl.load(sin + angle, mask=turns, other=0.0)
        tl.store(place, (one * c - two * s).to(y.dtype.element_ty), mask=inside)
        tl.store(place + half, (two * c + one * s).to(y.dtype.element_ty), mask=inside)


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


def add_and_turn_(
    qkv: Tensor, u: Tensor, v: Tensor, turn: Turn, *, heads: int, key_heads: int
) -> Tensor:
    """See `low_rank.add_and_turn_`; the halves of whole heads, cos and sin in float32 with equal strides."""
    (rows, _), rank, half = qkv.shape, u.shape[1] // 3, turn.cos.shape[1]
    if rows:
        _adapter_rotary[(heads + 2 * key_heads, triton.cdiv(rows, ROWS * BLOCKS))](
            qkv, u, v, turn.cos, turn.sin, rows, rank, half, heads, heads + key_heads,
            qkv.stride(0), *u.stride(), *v.stride(), turn.cos.stride(0),
            ROWS=ROWS, BLOCKS=BLOCKS, RANK=max(16, triton.next_power_of_2(rank)),
            HALF=max(16, triton.next_power_of_2(half)), num_warps=WARPS,
        )  # fmt: skip
    return qkv
