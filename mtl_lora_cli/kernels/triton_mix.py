"""Triton kernels of `mix.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_POSITIONS = 32  # of one program of `_adapter_mix`
_CHUNK = 512  # positions of one program of `_adapter_mix_gradient`


@triton.jit
def _adapter_mix(
    z, mixing, slot, u, u_stride, positions, rows,
    layer_stride, slot_stride, row_stride, column_stride,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1)
    layers = tl.num_programs(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < positions
    own = tl.load(slot + at, mask=inside, other=-1)
    active = own >= 0
    row = tl.arange(0, ROWS)
    matrices = (
        mixing
        + layer * layer_stride
        + own.to(tl.int64)[:, None] * slot_stride
        + row[None, :] * row_stride
    )
    wanted = active[:, None] & (row < rows)[None, :]
    z += at.to(tl.int64) * (layers * COLUMNS) + layer * COLUMNS
    total = tl.zeros((BLOCK, ROWS), dtype=tl.float32)
    for column in tl.range(COLUMNS, loop_unroll_factor=8):  # loads that do not wait for each other
        value = tl.load(z + column, mask=active, other=0.0).to(tl.float32)
        matrix = tl.load(matrices + column * column_stride, mask=wanted, other=0.0).to(tl.float32)
        total += value[:, None] * matrix
    u += at.to(tl.int64)[:, None] * u_stride + layer * rows + row[None, :]
    tl.store(u, total.to(u.dtype.element_ty), mask=inside[:, None] & (row < rows)[None, :])


@triton.jit
def _adapter_mix_gradient(
    du, z, slot, partial, positions, slots, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    mine = tl.program_id(1)
    layer = tl.program_id(2)
    layers = tl.num_programs(2)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, CHUNK, BLOCK):
        at = chunk * CHUNK + start + tl.arange(0, BLOCK)
        own = tl.load(slot + at, mask=at < positions, other=-1) == mine
        if tl.sum(own.to(tl.int32), axis=0) > 0:
            place = at.to(tl.int64)[:, None]
            gradient = tl.load(
                du + place * (layers * rows) + layer * rows + row[None, :],
                mask=own[:, None] & (row < rows)[None, :],
                other=0.0,
            )
            value = tl.load(
                z + place * (layers * columns) + layer * columns + column[None, :],
                mask=own[:, None] & (column < columns)[None, :],
                other=0.0,
            )
            total += tl.dot(tl.trans(gradient), value, input_precision="ieee")
    place = ((chunk * layers + layer) * slots + mine) * rows * columns
    tl.store(
        partial + place + row[:, None] * columns + column[None, :],
        total,
        mask=(row < rows)[:, None] & (column < columns)[None, :],
    )


def mix(z: Tensor, mixing: Tensor, slot: Tensor, *, transposed: bool, out: Tensor | None) -> Tensor:
    """See `mix.mix`; z contiguous."""
    if transposed:
        mixing = mixing.transpose(2, 3)
    layers, _, rows, columns = mixing.shape
    positions = z.shape[0]
    u = out
    if u is None:
        u = torch.empty(positions, layers * rows, dtype=z.dtype, device=z.device)
    if positions:
        _adapter_mix[(triton.cdiv(positions, _POSITIONS), layers)](
            z, mixing, slot, u, u.stride(0), positions, rows, *mixing.stride(),
            COLUMNS=columns, ROWS=triton.next_power_of_2(rows), BLOCK=_POSITIONS, num_warps=2,
        )  # fmt: skip
    return u


def mix_gradient(du: Tensor, z: Tensor, slot: Tensor, slots: int, layers: int) -> Tensor:
    """See `mix.mix_gradient`: each chunk of positions a partial sum, then their sum; no atomics."""
    positions, rows, columns = len(slot), du.shape[1] // layers, z.shape[1] // layers
    chunks = max(1, triton.cdiv(positions, _CHUNK))
    partial = torch.empty(
        chunks, layers, slots, rows, columns, dtype=torch.float32, device=z.device
    )
    _adapter_mix_gradient[(chunks, slots, layers)](
        du, z, slot, partial, positions, slots, rows, columns,
        ROWS=max(16, triton.next_power_of_2(rows)), COLUMNS=max(16, triton.next_power_of_2(columns)),
        CHUNK=_CHUNK, BLOCK=64, num_warps=4,
    )  # fmt: skip
    return partial.sum(0)
