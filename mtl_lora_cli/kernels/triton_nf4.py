"""Triton kernels of `nf4.py`: both levels of the quantisation in one pass over the bytes.

Where a row is a whole number of blocks, the scale is computed once a block and a place once a block; otherwise
once a byte.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BYTES = 1024  # of one program
_BLOCKS, _WARPS = 32, 4  # of one program with as many as there is work for
_MANY_BLOCKS, _MANY_WARPS = 512, 32  # of one that has a multiprocessor to itself


@triton.jit
def _nf4_expand(
    packed, code, absmax, absmax_code, absmax_scale, offset, out, count, width, row_stride,
    BLOCKSIZE: tl.constexpr, ABSMAX_BLOCKSIZE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = at < count
    both = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    block = (2 * at) // BLOCKSIZE
    small = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
    scale = tl.load(absmax_code + small) * tl.load(
        absmax_scale + block // ABSMAX_BLOCKSIZE, mask=inside, other=0.0
    ) + tl.load(offset)
    first = tl.load(code + (both >> 4)) * scale  # the high half comes first
    second = tl.load(code + (both & 15)) * scale
    values = tl.interleave(first, second).to(out.dtype.element_ty)
    element = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    place = out + (element // width) * row_stride + element % width
    tl.store(place, values, mask=element < 2 * count)


@triton.jit
def _nf4_expand_blocks(
    packed, code, absmax, absmax_code, absmax_scale, offset, out, count, row_blocks, row_stride,
    BLOCKSIZE: tl.constexpr, ABSMAX_BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = BLOCKSIZE // 2
    bytes_of = tl.arange(0, half)
    values_of = tl.arange(0, BLOCKSIZE)
    shift = tl.load(offset)
    for tile in range(tl.program_id(0), tl.cdiv(count, BLOCKS), tl.num_programs(0)):
        block = tile * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < count
        small = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        scale = (
            tl.load(absmax_code + small)
            * tl.load(absmax_scale + block // ABSMAX_BLOCKSIZE, mask=inside, other=0.0)
            + shift
        )
        at = block.to(tl.int64)[:, None] * half + bytes_of[None, :]
        both = tl.load(packed + at, mask=inside[:, None], other=0).to(tl.int32)
        first = tl.load(code + (both >> 4)) * scale[:, None]  # the high half comes first
        second = tl.load(code + (both & 15)) * scale[:, None]
        values = tl.interleave(first, second).to(out.dtype.element_ty)
        row = (block // row_blocks).to(tl.int64) * row_stride + (block % row_blocks) * BLOCKSIZE
        tl.store(out + row[:, None] + values_of[None, :], values, mask=inside[:, None])


def expand(packed: Tensor, state: Any, out: Tensor, programs: int | None = None) -> Tensor:
    """See `nf4.expand`; double quantisation only.

    Args:
        programs: how many run, each with as many threads as a multiprocessor holds; None: as many as there is
            work for.
    """
    data = packed.detach().reshape(-1).view(torch.uint8)
    inner = state.state2
    tables = (data, state.code, state.absmax, inner.code, inner.absmax, state.offset, out)
    if out.shape[1] % state.blocksize:  # a block would lie in two rows
        _nf4_expand[(triton.cdiv(data.numel(), _BYTES),)](
            *tables, data.numel(), out.shape[1], out.stride(0),
            BLOCKSIZE=state.blocksize, ABSMAX_BLOCKSIZE=inner.blocksize, BYTES=_BYTES, num_warps=4,
        )  # fmt: skip
        return out
    count = out.numel() // state.blocksize
    blocks, warps = (_BLOCKS, _WARPS) if programs is None else (_MANY_BLOCKS, _MANY_WARPS)
    tiles = triton.cdiv(count, blocks)
    _nf4_expand_blocks[(tiles if programs is None else min(tiles, programs),)](
        *tables, count, out.shape[1] // state.blocksize, out.stride(0),
        BLOCKSIZE=state.blocksize, ABSMAX_BLOCKSIZE=inner.blocksize, BLOCKS=blocks, num_warps=warps,
    )  # fmt: skip
    return out
