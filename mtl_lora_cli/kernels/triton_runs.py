"""Triton kernels of `mix.mix_gradient` by runs (`runs.py`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtl_lora_cli.kernels.runs import PIECE, Runs
from mtl_lora_cli.kernels.triton_mix import tile

_MANY = 16  # pieces of a slot at once
_VALUES = 256  # of M


@triton.jit(do_not_specialize=["slots"])  # one compilation for any number of them
def _adapter_run_sums(
    du, z, pieces, ends, partial, du_stride, z_stride, du_width, z_width, rows, columns, slots,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    if piece < tl.load(ends + slots):
        across = tl.cdiv(columns, COLUMNS)
        tiles = tl.cdiv(rows, ROWS) * across
        layer, part = tl.program_id(1) // tiles, tl.program_id(1) % tiles
        layers = tl.num_programs(1) // tiles
        row = (part // across) * ROWS + tl.arange(0, ROWS)
        column = (part % across) * COLUMNS + tl.arange(0, COLUMNS)
        at = tl.load(pieces + 2 * piece) + tl.arange(0, BLOCK)
        inside = (at < tl.load(pieces + 2 * piece + 1))[:, None]
        place = at.to(tl.int64)[:, None]
        gradient = tl.load(
            du + place * du_stride + layer * du_width + row[None, :],
            mask=inside & (row < rows)[None, :],
            other=0.0,
        )
        value = tl.load(
            z + place * z_stride + layer * z_width + column[None, :],
            mask=inside & (column < columns)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(gradient), value, input_precision="ieee")
        partial += (piece * layers + layer).to(tl.int64) * rows * columns
        tl.store(
            partial + row[:, None] * columns + column[None, :],
            total,
            mask=(row < rows)[:, None] & (column < columns)[None, :],
        )


@triton.jit
def _adapter_run_totals(
    partial, ends, out, values, MANY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    slot, layer = tl.program_id(0), tl.program_id(1)
    slots, layers = tl.num_programs(0), tl.num_programs(1)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    known = at < values
    first, end = tl.load(ends + slot), tl.load(ends + slot + 1)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for some in range(first, end, MANY):
        piece = some + tl.arange(0, MANY)
        place = (piece * layers + layer).to(tl.int64) * values
        got = tl.load(
            partial + place[:, None] + at[None, :],
            mask=(piece < end)[:, None] & known[None, :],
            other=0.0,
        )
        total += tl.sum(got, axis=0)
    tl.store(out + (layer * slots + slot).to(tl.int64) * values + at, total, mask=known)


def mix_gradient(du: Tensor, z: Tensor, runs: Runs, like: torch.Size) -> Tensor:
    """See `mix.mix_gradient`: each piece a partial sum, then each slot's sum of them; no atomics."""
    layers, slots, rows, columns = like
    count, values = len(runs.pieces), rows * columns
    out = torch.empty(like, dtype=torch.float32, device=z.device)
    partial = torch.empty(count, layers, values, dtype=torch.float32, device=z.device)
    down, across = tile(rows), tile(columns)
    tiles = triton.cdiv(rows, down) * triton.cdiv(columns, across)
    if count:
        _adapter_run_sums[(count, layers * tiles)](
            du, z, runs.pieces, runs.ends, partial, du.stride(0), z.stride(0),
            du.shape[1] // layers, z.shape[1] // layers, rows, columns, slots,
            ROWS=down, COLUMNS=across, BLOCK=PIECE, num_warps=4,
        )  # fmt: skip
    _adapter_run_totals[(slots, layers, triton.cdiv(values, _VALUES))](
        partial, runs.ends, out, values, MANY=_MANY, BLOCK=_VALUES, num_warps=4
    )
    return out
