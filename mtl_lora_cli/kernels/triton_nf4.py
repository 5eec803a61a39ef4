"""Triton kernels of `nf4.py`: both levels of the quantisation in one pass over the bytes.

`_nf4_expand` reads a byte at a time and looks its two values up in memory: any width, any dtype. On a card, where a
row of 16 bits is a whole number of blocks, `_nf4_expand_words` reads four bytes a thread and looks their eight values
up in the registers of its neighbours, which takes a third of the instructions, for the same bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BYTES = 1024  # of one program
_WORDS = 1024  # of a program at a time, one a thread
_BESIDE = 2  # programs on a multiprocessor, which holds no more
_MOST_WORDS = 2**28  # places are counted in 32 bits


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
def _word(
    packed, absmax, absmax_scale, word, count, BLOCK_WORDS: tl.constexpr, NESTED: tl.constexpr
):
    """Eight values in 4 bits, and both parts of their scale."""
    inside = word < count
    both = tl.load(packed + word, mask=inside, other=0)
    small = tl.load(absmax + word // BLOCK_WORDS, mask=inside, other=0).to(tl.int32)
    large = tl.load(absmax_scale + word // (BLOCK_WORDS * NESTED), mask=inside, other=0.0)
    return both, small, large


@triton.jit
def _write(
    out, word, count, both, scale, own, row_stride, ROW_WORDS: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    row = word // ROW_WORDS
    place = out + (row.to(tl.int64) * row_stride + (word - row * ROW_WORDS) * 8)
    tl.inline_asm_elementwise(
        STORE, "=r,r,r,f,l,r",
        [both, own, scale, place.to(tl.int64), (word < count).to(tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _nf4_expand_words(
    packed, code, absmax, absmax_code, absmax_scale, offset, out, count, row_stride,
    ROW_WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, NESTED: tl.constexpr, WORDS: tl.constexpr,
    STORE: tl.constexpr,
):  # fmt: skip
    """Words of eight values; the next four of a thread are on their way while it works on the last."""
    shift = tl.load(offset)
    own = tl.load(code + tl.arange(0, WORDS) % 16).to(tl.int32, bitcast=True)
    step = tl.num_programs(0) * WORDS
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    a, a_small, a_large = _word(packed, absmax, absmax_scale, word, count, BLOCK_WORDS, NESTED)
    b, b_small, b_large = _word(
        packed, absmax, absmax_scale, word + step, count, BLOCK_WORDS, NESTED
    )
    c, c_small, c_large = _word(
        packed, absmax, absmax_scale, word + 2 * step, count, BLOCK_WORDS, NESTED
    )
    d, d_small, d_large = _word(
        packed, absmax, absmax_scale, word + 3 * step, count, BLOCK_WORDS, NESTED
    )
    for _ in range(tl.program_id(0) * WORDS, count, step):
        scale = tl.load(absmax_code + a_small) * a_large + shift
        now, here = a, word
        word += step
        a, a_small, a_large = b, b_small, b_large
        b, b_small, b_large = c, c_small, c_large
        c, c_small, c_large = d, d_small, d_large
        d, d_small, d_large = _word(
            packed, absmax, absmax_scale, word + 3 * step, count, BLOCK_WORDS, NESTED
        )
        _write(out, here, count, now, scale, own, row_stride, ROW_WORDS, STORE)


def _store(kind: str) -> str:
    """Eight values of a word looked up, scaled, rounded and written, in PTX.

    The sixteen levels lie in the lanes of a warp, twice; a lane asks the one that its four bits name, of which
    the shuffle takes the lowest. In a byte the high half comes first.
    """
    pair = """
    shr.u32 s, $1, {high}; shr.u32 t, $1, {low};
    shfl.sync.idx.b32 s, $2, s, 0x101f, 0xffffffff; shfl.sync.idx.b32 t, $2, t, 0x101f, 0xffffffff;
    mov.b32 x, s; mov.b32 y, t; mul.f32 x, x, $3; mul.f32 y, y, $3;
    cvt.rn.{kind}x2.f32 w{number}, y, x;"""
    pairs = "".join(
        pair.format(high=8 * number + 4, low=8 * number, number=number, kind=kind)
        for number in range(4)
    )
    return (
        "{ .reg .b32 s, t, w0, w1, w2, w3; .reg .f32 x, y; .reg .pred p;"
        + pairs
        + """
    setp.ne.b32 p, $5, 0; @p st.global.v4.b32 [$4], {w0, w1, w2, w3}; mov.b32 $0, 0; }"""
    )


_STORES = {torch.bfloat16: _store("bf16"), torch.float16: _store("f16")}


def expand(packed: Tensor, state: Any, out: Tensor) -> Tensor:
    """See `nf4.expand`; double quantisation only."""
    data = packed.detach().reshape(-1).view(torch.uint8)
    inner = state.state2
    tables = (state.code, state.absmax, inner.code, inner.absmax, state.offset, out)
    whole = (
        out.shape[1] % state.blocksize == 0 and out.stride(0) % 8 == 0
    )  # no word lies in two rows
    store = _STORES.get(out.dtype) if out.is_cuda else None
    if store is None or not whole or data.numel() // 4 >= _MOST_WORDS or out.data_ptr() % 16:
        _nf4_expand[(triton.cdiv(data.numel(), _BYTES),)](
            data, *tables, data.numel(), out.shape[1], out.stride(0),
            BLOCKSIZE=state.blocksize, ABSMAX_BLOCKSIZE=inner.blocksize, BYTES=_BYTES, num_warps=4,
        )  # fmt: skip
        return out
    most = _BESIDE * _multiprocessors(out.device)
    count = data.numel() // 4
    _nf4_expand_words[(min(triton.cdiv(count, _WORDS), most),)](
        data.view(torch.int32), *tables, count, out.stride(0),
        ROW_WORDS=out.shape[1] // 8, BLOCK_WORDS=state.blocksize // 8, NESTED=inner.blocksize,
        WORDS=_WORDS, STORE=store, num_warps=_WORDS // 32,
    )  # fmt: skip
    return out


@cache
def _multiprocessors(device: torch.device) -> int:
    """That a card has."""
    return torch.cuda.get_device_properties(device).multi_processor_count
