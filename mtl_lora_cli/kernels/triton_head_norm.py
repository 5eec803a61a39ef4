"""Triton kernels of `head_norm.py`: a program for as many heads as there are keys', of a few positions.

So no lane of a program stays empty, whatever the number of heads: a program's heads are all queries, all keys
or all values. Where all heads are normed together, a program has those of one position.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtl_lora_cli.kernels.head_norm import HeadNorms
from mtl_lora_cli.kernels.rotary import Turn

_VALUES = 2048  # of one program

# A head's columns stand in three parts: x₁ and x₂, which turn, and the rest, which does not. Without a
# rotation x₁ and x₂ are the halves.


@triton.jit
def _place(
    heads, key_heads, positions,
    TOGETHER: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The program's first head, and for each of its rows position, head and whether there is one."""
    block = tl.program_id(1)
    first = block * key_heads
    count = key_heads
    if TOGETHER:
        first = tl.where(block == 0, 0, heads + (block - 1) * key_heads)
        count = tl.where(block == 0, heads, key_heads)
    row = tl.arange(0, ROWS)
    position = tl.program_id(0).to(tl.int64) * (ROWS // HEADS) + row // HEADS
    head = row % HEADS
    return first, position, head, (position < positions) & (head < count)


@triton.jit
def _columns(half, PAIRS: tl.constexpr, HALF: tl.constexpr):
    column = tl.arange(0, HALF)[None, :]
    if PAIRS:
        one, two = 2 * column, 2 * column + 1
    else:
        one, two = column, column + half
    return one, two, column < half


@triton.jit
def _mean(one, two, three, dim, heads, TOGETHER: tl.constexpr, REST: tl.constexpr):
    """The mean of what stands in a head's parts, or in those of all heads: [ROWS, 1]."""
    total = tl.sum(one, axis=1) + tl.sum(two, axis=1)
    if REST:
        total += tl.sum(three, axis=1)
    if TOGETHER:
        total = tl.zeros_like(total) + tl.sum(total, axis=0) / heads
    return (total / dim)[:, None]


@triton.jit
def _head_norm(
    x, q_weight, k_weight, cos, sin, out, stride, angle_stride, positions, heads, key_heads, dim, half,
    eps, TOGETHER: tl.constexpr, TURN: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    first, position, head, real = _place(heads, key_heads, positions, TOGETHER, HEADS, ROWS)
    at_one, at_two, turning = _columns(half, PAIRS, HALF)
    inside = real[:, None] & turning
    place = (position * stride + (first + head) * dim)[:, None]
    one = tl.load(x + place + at_one, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(x + place + at_two, mask=inside, other=0.0).to(tl.float32)
    three = one
    if REST:
        at_three = 2 * half + tl.arange(0, REST)[None, :]
        behind = real[:, None] & (at_three < dim)
        three = tl.load(x + place + at_three, mask=behind, other=0.0).to(tl.float32)
    if first < heads + key_heads:
        together = tl.where(first < heads, heads, key_heads)
        square = three * three
        inverse = tl.rsqrt(_mean(one * one, two * two, square, dim, together, TOGETHER, REST) + eps)
        own = (head * 0)[:, None]
        if TOGETHER:
            own = (head * dim)[:, None]
        if first < heads:
            one *= tl.load(q_weight + own + at_one, mask=inside, other=0.0).to(tl.float32) * inverse
            two *= tl.load(q_weight + own + at_two, mask=inside, other=0.0).to(tl.float32) * inverse
            if REST:
                three *= tl.load(q_weight + own + at_three, mask=behind, other=0.0) * inverse
        else:
            one *= tl.load(k_weight + own + at_one, mask=inside, other=0.0).to(tl.float32) * inverse
            two *= tl.load(k_weight + own + at_two, mask=inside, other=0.0).to(tl.float32) * inverse
            if REST:
                three *= tl.load(k_weight + own + at_three, mask=behind, other=0.0) * inverse
        if TURN:
            angle = (position * angle_stride)[:, None] + tl.arange(0, HALF)[None, :]
            c = tl.load(cos + angle, mask=inside, other=1.0)
            s = tl.load(sin + angle, mask=inside, other=0.0)
            turned = one * c - two * s
            two = two * c + one * s
            one = turned
    tl.store(out + place + at_one, one.to(out.dtype.element_ty), mask=inside)
    tl.store(out + place + at_two, two.to(out.dtype.element_ty), mask=inside)
    if REST:
        tl.store(out + place + at_three, three.to(out.dtype.element_ty), mask=behind)


@triton.jit
def _head_norm_gradient(
    dh, x, q_weight, k_weight, cos, sin, dh_stride, stride, angle_stride, positions, heads, key_heads,
    dim, half, eps, TOGETHER: tl.constexpr, TURN: tl.constexpr, PAIRS: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    first, position, head, real = _place(heads, key_heads, positions, TOGETHER, HEADS, ROWS)
    at_one, at_two, turning = _columns(half, PAIRS, HALF)
    inside = real[:, None] & turning
    place = (position * stride + (first + head) * dim)[:, None]
    d_place = (position * dh_stride + (first + head) * dim)[:, None]
    one = tl.load(x + place + at_one, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(x + place + at_two, mask=inside, other=0.0).to(tl.float32)
    d_one = tl.load(dh + d_place + at_one, mask=inside, other=0.0).to(tl.float32)
    d_two = tl.load(dh + d_place + at_two, mask=inside, other=0.0).to(tl.float32)
    three, d_three = one, d_one
    if REST:
        at_three = 2 * half + tl.arange(0, REST)[None, :]
        behind = real[:, None] & (at_three < dim)
        three = tl.load(x + place + at_three, mask=behind, other=0.0).to(tl.float32)
        d_three = tl.load(dh + d_place + at_three, mask=behind, other=0.0).to(tl.float32)
    if TURN:
        angle = (position * angle_stride)[:, None] + tl.arange(0, HALF)[None, :]
        c = tl.load(cos + angle, mask=inside, other=1.0)
        s = tl.load(sin + angle, mask=inside, other=0.0)
        turned = d_one * c + d_two * s
        d_two = d_two * c - d_one * s
        d_one = turned
    own = (head * 0)[:, None]
    if TOGETHER:
        own = (head * dim)[:, None]
    if first < heads:
        d_one *= tl.load(q_weight + own + at_one, mask=inside, other=0.0).to(tl.float32)
        d_two *= tl.load(q_weight + own + at_two, mask=inside, other=0.0).to(tl.float32)
        if REST:
            d_three *= tl.load(q_weight + own + at_three, mask=behind, other=0.0).to(tl.float32)
    else:
        d_one *= tl.load(k_weight + own + at_one, mask=inside, other=0.0).to(tl.float32)
        d_two *= tl.load(k_weight + own + at_two, mask=inside, other=0.0).to(tl.float32)
        if REST:
            d_three *= tl.load(k_weight + own + at_three, mask=behind, other=0.0).to(tl.float32)
    together = tl.where(first < heads, heads, key_heads)
    square = three * three
    inverse = tl.rsqrt(_mean(one * one, two * two, square, dim, together, TOGETHER, REST) + eps)
    one *= inverse
    two *= inverse
    three *= inverse
    shared = _mean(d_one * one, d_two * two, d_three * three, dim, together, TOGETHER, REST)
    kind = dh.dtype.element_ty
    tl.store(dh + d_place + at_one, (inverse * (d_one - one * shared)).to(kind), mask=inside)
    tl.store(dh + d_place + at_two, (inverse * (d_two - two * shared)).to(kind), mask=inside)
    if REST:
        d_three = inverse * (d_three - three * shared)
        tl.store(dh + d_place + at_three, d_three.to(kind), mask=behind)


def head_norm(
    qkv: Tensor, norms: HeadNorms, turn: Turn | None, *, heads: int, key_heads: int
) -> Tensor:
    """See `head_norm.head_norm`."""
    out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if len(qkv):
        qkv = qkv.contiguous()
        cos, sin, angle_stride = _angles(turn)
        dim, half = _sizes(qkv, turn, heads, key_heads)
        grid, shape = _launch(qkv, norms, turn, heads, key_heads, values=True)
        _head_norm[grid](
            qkv, norms.q, norms.k, cos, sin, out, qkv.stride(0), angle_stride, len(qkv), heads,
            key_heads, dim, half, norms.eps, **shape,
        )  # fmt: skip
    return out


def head_norm_gradient_(
    dqkv: Tensor,
    qkv: Tensor,
    norms: HeadNorms,
    turn: Turn | None,
    *,
    heads: int,
    key_heads: int,
) -> Tensor:
    """See `head_norm.head_norm_gradient_`."""
    if len(qkv):
        cos, sin, angle_stride = _angles(turn)
        dim, half = _sizes(qkv, turn, heads, key_heads)
        grid, shape = _launch(qkv, norms, turn, heads, key_heads, values=False)
        _head_norm_gradient[grid](
            dqkv, qkv, norms.q, norms.k, cos, sin, dqkv.stride(0), qkv.stride(0), angle_stride,
            len(qkv), heads, key_heads, dim, half, norms.eps, **shape,
        )  # fmt: skip
    return dqkv


def _angles(turn: Turn | None) -> tuple[Tensor | None, Tensor | None, int]:
    """cos and sin, float32 with equal strides."""
    return (None, None, 0) if turn is None else (turn.cos, turn.sin, turn.cos.stride(0))


def _sizes(qkv: Tensor, turn: Turn | None, heads: int, key_heads: int) -> tuple[int, int]:
    """D, and the columns of x₁."""
    dim = qkv.shape[1] // (heads + 2 * key_heads)
    return dim, dim // 2 if turn is None else turn.cos.shape[1]


def _launch(
    qkv: Tensor, norms: HeadNorms, turn: Turn | None, heads: int, key_heads: int, *, values: bool
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid, and the shape of its programs; `values`: with those that copy v."""
    dim, half = _sizes(qkv, turn, heads, key_heads)
    together = norms.q.shape[0] != dim
    each = triton.next_power_of_2(heads if together else key_heads)
    columns = triton.next_power_of_2(half)
    rest = triton.next_power_of_2(dim - 2 * half) if dim > 2 * half else 0
    width = each * (2 * columns + rest)
    # A power of two of positions, as many as a program holds; where heads are normed together, one.
    positions = 1 if together else max(1, triton.next_power_of_2(_VALUES // width + 1) // 2)
    blocks = (2 if together else heads // key_heads + 1) + values
    shape = {
        "TOGETHER": together,
        "TURN": turn is not None,
        "PAIRS": turn is not None and turn.pairs,
        "HEADS": each,
        "ROWS": each * positions,
        "HALF": columns,
        "REST": rest,
        "num_warps": min(16, triton.next_power_of_2(max(1, positions * width // 512))),
    }
    return (triton.cdiv(len(qkv), positions), blocks), shape
