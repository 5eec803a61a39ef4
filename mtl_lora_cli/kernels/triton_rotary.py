"""Triton kernel of `rotary.py`: a program a position, its angles in registers for all heads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mtl_lora_cli.kernels.rotary import Turn


@triton.jit
def _rotary(
    x,
    cos,
    sin,
    stride,
    angle_stride,
    heads,
    dim,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    BACK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    c = tl.load(cos + row * angle_stride + column, mask=column < half, other=1.0)
    s = tl.load(sin + row * angle_stride + column, mask=column < half, other=0.0)
    if BACK:
        s = -s
    if (
        PAIRS
    ):  # read and written in one piece: every second value by itself takes many times as long
        both = tl.arange(0, 2 * HALF)[None, :]
        place = x + head * dim + both
        there = (head < heads) & (both < 2 * half)
        value = tl.load(place, mask=there, other=0.0).to(tl.float32)
        one, two = tl.split(tl.reshape(value, (HEADS, HALF, 2)))
        turned = tl.join(one * c - two * s, two * c + one * s)
        value = tl.reshape(turned, (HEADS, 2 * HALF))
        tl.store(place, value.to(x.dtype.element_ty), mask=there)
    else:
        first = x + head * dim + column
        second = first + half
        one = tl.load(first, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(second, mask=inside, other=0.0).to(tl.float32)
        tl.store(first, (one * c - two * s).to(x.dtype.element_ty), mask=inside)
        tl.store(second, (two * c + one * s).to(x.dtype.element_ty), mask=inside)


def rotate_(qkv: Tensor, turn: Turn, *, heads: int, key_heads: int, back: bool) -> Tensor:
    """See `rotary.rotate_`; cos and sin in float32 with equal strides."""
    positions, width = qkv.shape
    dim, half = width // (heads + 2 * key_heads), turn.cos.shape[1]
    if positions:
        _rotary[(positions,)](
            qkv, turn.cos, turn.sin, qkv.stride(0), turn.cos.stride(0), heads + key_heads, dim, half,
            HEADS=triton.next_power_of_2(heads + key_heads), HALF=triton.next_power_of_2(half),
            PAIRS=turn.pairs, BACK=back, num_warps=4,
        )  # fmt: skip
    return qkv
