"""Triton kernel of `pair_mix.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtl_lora_cli.kernels.triton_mix import tile


@triton.jit
def _adapter_pair_mix_gradient(
    du, z, slot, ends, out, du_stride, z_stride, each, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    mine = tl.program_id(0)
    expert = mine // each
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        own = tl.load(slot + at, mask=at < end, other=-1) == mine
        if tl.sum(own.to(tl.int32), axis=0) > 0:
            place = at.to(tl.int64)[:, None]
            gradient = tl.load(
                du + place * du_stride + row[None, :],
                mask=own[:, None] & (row < rows)[None, :],
                other=0.0,
            )
            value = tl.load(
                z + place * z_stride + column[None, :],
                mask=own[:, None] & (column < columns)[None, :],
                other=0.0,
            )
            total += tl.dot(tl.trans(gradient), value, input_precision="ieee")
    out += mine.to(tl.int64) * rows * columns
    tl.store(
        out + row[:, None] * columns + column[None, :],
        total,
        mask=(row < rows)[:, None] & (column < columns)[None, :],
    )


def pair_mix_gradient(
    du: Tensor, z: Tensor, slot: Tensor, ends: Tensor, like: torch.Size
) -> Tensor:
    """See `pair_mix.pair_mix_gradient`."""
    slots, rows, columns = like
    du, z = du.contiguous(), z.contiguous()
    out = torch.empty(like, dtype=torch.float32, device=z.device)
    down, across = tile(rows), tile(columns)
    grid = (slots, triton.cdiv(rows, down), triton.cdiv(columns, across))
    _adapter_pair_mix_gradient[grid](
        du, z, slot, ends, out, du.stride(0), z.stride(0), slots // len(ends), rows, columns,
        ROWS=down, COLUMNS=across, BLOCK=64, num_warps=4,
    )  # fmt: skip
    return out
