"""Triton kernel of `nf4.py`: both levels of the quantisation in one pass over the bytes."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BYTES = 1024  # of one program


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


def expand(packed: Tensor, state: Any, out: Tensor) -> Tensor:
    """See `nf4.expand`; double quantisation only."""
    data = packed.detach().reshape(-1).view(torch.uint8)
    inner = state.state2
    _nf4_expand[(triton.cdiv(data.numel(), _BYTES),)](
        data, state.code, state.absmax, inner.code, inner.absmax, state.offset, out,
        data.numel(), out.shape[1], out.stride(0),
        BLOCKSIZE=state.blocksize, ABSMAX_BLOCKSIZE=inner.blocksize, BYTES=_BYTES, num_warps=4,
    )  # fmt: skip
    return out
