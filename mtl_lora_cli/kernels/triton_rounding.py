"""Triton kernels of `rounding.py`: a program a row, which it holds in registers until its largest magnitude is known."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtl_lora_cli.kernels.fp8 import Form, Rounded
from mtl_lora_cli.kernels.gated import CUBE, ROOT, Activation
from mtl_lora_cli.kernels.rotary import Turn
from mtl_lora_cli.kernels.triton_fp8 import Targets, put_eight, put_row, scale_of
from mtl_lora_cli.kernels.triton_gated import active_of, gradients_of

WIDEST = 32768  # features of an activation that a program holds


@triton.jit
def _gated_rows(
    both, exact, values, scale, half,
    GELU: tl.constexpr, EXACT: tl.constexpr, EIGHT: tl.constexpr, BLOCK: tl.constexpr,
    ROOT: tl.constexpr, CUBE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < half
    gate = tl.load(both + row * 2 * half + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * half + half + at, mask=inside, other=0.0).to(tl.float32)
    value = active_of(gate, GELU, ROOT, CUBE) * up
    put_row(value, exact, values, scale, row, at, inside, half, half, EXACT, EIGHT)


@triton.jit
def _gated_gradient_rows(
    da, both, exact, values, scale, out, half,
    GELU: tl.constexpr, AGAIN: tl.constexpr, EXACT: tl.constexpr, EIGHT: tl.constexpr,
    BLOCK: tl.constexpr, ROOT: tl.constexpr, CUBE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < half
    first, second = row * 2 * half + at, row * 2 * half + half + at
    gate = tl.load(both + first, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + second, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(da + row * half + at, mask=inside, other=0.0).to(tl.float32)
    dgate, active = gradients_of(gradient, gate, up, GELU, ROOT, CUBE)
    if AGAIN:
        tl.store(out + row * half + at, (active * up).to(out.dtype.element_ty), mask=inside)
    dgate = dgate.to(exact.dtype.element_ty)
    dup = (gradient * active).to(exact.dtype.element_ty)
    if EXACT:
        tl.store(exact + first, dgate, mask=inside)
        tl.store(exact + second, dup, mask=inside)
    if EIGHT:
        one, two = dgate.to(tl.float32), dup.to(tl.float32)
        factor = scale_of(tl.max(tl.maximum(tl.abs(one), tl.abs(two)), axis=0))
        tl.store(scale + row, factor)
        put_eight(one, 1.0 / factor, values + first, inside)
        put_eight(two, 1.0 / factor, values + second, inside)


@triton.jit
def _turned_back(x, cos, sin, first, half, inside, EXACT: tl.constexpr):
    """Heads whose first halves stand at `first`, turned by −θ and rounded to their dtype, as float32."""
    one = tl.load(x + first, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(x + first + half, mask=inside, other=0.0).to(tl.float32)
    turned = (one * cos + two * sin).to(x.dtype.element_ty)
    other = (two * cos - one * sin).to(x.dtype.element_ty)
    if EXACT:
        tl.store(x + first, turned, mask=inside)
        tl.store(x + first + half, other, mask=inside)
    one, two = turned.to(tl.float32), other.to(tl.float32)
    return one, two, tl.max(tl.max(tl.maximum(tl.abs(one), tl.abs(two)), axis=1), axis=0)


@triton.jit
def _rotary_rows(
    x, cos, sin, values, scale, stride, angle_stride, heads, key_heads, half, width,
    EXACT: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    values += row * width
    column = tl.arange(0, HALF)[None, :]
    there = column < half
    c = tl.load(cos + row * angle_stride + column, mask=there, other=1.0)
    s = tl.load(sin + row * angle_stride + column, mask=there, other=0.0)
    query, key = tl.arange(0, HEADS)[:, None], tl.arange(0, KEY_HEADS)[:, None]
    q, k = query * 2 * half + column, (heads + key) * 2 * half + column
    of_q, of_k = there & (query < heads), there & (key < key_heads)
    q_one, q_two, most = _turned_back(x, c, s, q, half, of_q, EXACT)
    k_one, k_two, more = _turned_back(x, c, s, k, half, of_k, EXACT)
    v = (heads + key_heads) * 2 * half + tl.arange(0, REST)
    of_v = v < width
    rest = tl.load(x + v, mask=of_v, other=0.0).to(tl.float32)
    factor = scale_of(tl.maximum(tl.maximum(most, more), tl.max(tl.abs(rest), axis=0)))
    tl.store(scale + row, factor)
    inverse = 1.0 / factor
    put_eight(q_one, inverse, values + q, of_q)
    put_eight(q_two, inverse, values + q + half, of_q)
    put_eight(k_one, inverse, values + k, of_k)
    put_eight(k_two, inverse, values + k + half, of_k)
    put_eight(rest, inverse, values + v, of_v)


def gated(both: Tensor, activation: Activation, form: Form) -> Rounded:
    """See `rounding.gated`; contiguous."""
    rows, half = both.shape[0], both.shape[1] // 2
    made = Targets(both, rows, half, 0, form)
    if rows:
        how = _launch(half, activation, each=32)
        _gated_rows[(rows,)](both, *made.pointers, half, **made.flags, **how)
    return made.rounded()


def gated_gradient(
    da: Tensor, both: Tensor, activation: Activation, form: Form, *, again: bool
) -> tuple[Rounded, Tensor | None]:
    """See `rounding.gated_gradient`; contiguous. The exact gradient is written over [g | u]."""
    rows, half = da.shape
    made = Targets(both, rows, 2 * half, 0, form, given=None if form == "eight" else both)
    out = torch.empty_like(da) if again else None
    if rows:
        how = _launch(half, activation, each=16)
        _gated_gradient_rows[(rows,)](
            da, both, *made.pointers, out, half, AGAIN=again, **made.flags, **how
        )
    return made.rounded(), out


def rotate_back(dqkv: Tensor, turn: Turn, form: Form, *, heads: int, key_heads: int) -> Rounded:
    """See `rounding.rotate_back`; contiguous, in place, the halves of whole heads."""
    rows, width = dqkv.shape
    half = turn.cos.shape[1]
    made = Targets(dqkv, rows, width, 0, form, given=None if form == "eight" else dqkv)
    _, values, scale = made.pointers
    if rows:
        sides = (heads, key_heads, half, width - 2 * (heads + key_heads) * half)
        _rotary_rows[(rows,)](
            dqkv, turn.cos, turn.sin, values, scale, dqkv.stride(0), turn.cos.stride(0), heads,
            key_heads, half, width, form != "eight", *map(triton.next_power_of_2, sides),
            num_warps=4,
        )  # fmt: skip
    return made.rounded()


def _launch(half: int, activation: Activation, *, each: int) -> dict[str, Any]:
    """The shape of a program whose threads hold so many features each."""
    block = triton.next_power_of_2(half)
    return {
        "GELU": activation == "gelu_tanh",
        "BLOCK": block,
        "ROOT": ROOT,
        "CUBE": CUBE,
        "num_warps": min(32, max(1, block // (32 * each))),
    }
