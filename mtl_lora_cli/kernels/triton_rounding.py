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
def _rotary_rows(
    x, cos, sin, values, scale, stride, angle_stride, heads, half, width,
    EXACT: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    values += row * width
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    c = tl.load(cos + row * angle_stride + column, mask=column < half, other=1.0)
    s = tl.load(sin + row * angle_stride + column, mask=column < half, other=0.0)
    first = head * 2 * half + column
    second = first + half
    one = tl.load(x + first, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(x + second, mask=inside, other=0.0).to(tl.float32)
    turned = (one * c + two * s).to(x.dtype.element_ty)
    other = (two * c - one * s).to(x.dtype.element_ty)
    if EXACT:
        tl.store(x + first, turned, mask=inside)
        tl.store(x + second, other, mask=inside)
    one, two = turned.to(tl.float32), other.to(tl.float32)
    behind = heads * 2 * half + tl.arange(0, REST)
    there = behind < width
    rest = tl.load(x + behind, mask=there, other=0.0).to(tl.float32)
    largest = tl.max(tl.max(tl.maximum(tl.abs(one), tl.abs(two)), axis=1), axis=0)
    factor = scale_of(tl.maximum(largest, tl.max(tl.abs(rest), axis=0)))
    tl.store(scale + row, factor)
    put_eight(one, 1.0 / factor, values + first, inside)
    put_eight(two, 1.0 / factor, values + second, inside)
    put_eight(rest, 1.0 / factor, values + behind, there)


def gated(both: Tensor, activation: Activation, form: Form) -> Rounded:
    """See `rounding.gated`; contiguous."""
    rows, half = both.shape[0], both.shape[1] // 2
    made = Targets(both, rows, half, 0, form)
    if rows:
        _gated_rows[(rows,)](both, *made.pointers, half, **made.flags, **_launch(half, activation))
    return made.rounded()


def gated_gradient(
    da: Tensor, both: Tensor, activation: Activation, form: Form, *, again: bool
) -> tuple[Rounded, Tensor | None]:
    """See `rounding.gated_gradient`; contiguous. The exact gradient is written over [g | u]."""
    rows, half = da.shape
    made = Targets(both, rows, 2 * half, 0, form, given=None if form == "eight" else both)
    out = torch.empty_like(da) if again else None
    if rows:
        _gated_gradient_rows[(rows,)](
            da, both, *made.pointers, out, half,
            AGAIN=again, **made.flags, **_launch(half, activation),
        )  # fmt: skip
    return made.rounded(), out


def rotate_back(dqkv: Tensor, turn: Turn, form: Form, *, heads: int) -> Rounded:
    """See `rounding.rotate_back`; contiguous, in place, the halves of whole heads."""
    rows, width = dqkv.shape
    half = turn.cos.shape[1]
    made = Targets(dqkv, rows, width, 0, form, given=None if form == "eight" else dqkv)
    _, values, scale = made.pointers
    if rows:
        _rotary_rows[(rows,)](
            dqkv, turn.cos, turn.sin, values, scale, dqkv.stride(0), turn.cos.stride(0), heads,
            half, width, EXACT=form != "eight", HEADS=triton.next_power_of_2(heads),
            HALF=triton.next_power_of_2(half),
            REST=triton.next_power_of_2(width - 2 * heads * half), num_warps=8,
        )  # fmt: skip
    return made.rounded()


def _launch(half: int, activation: Activation) -> dict[str, Any]:
    block = triton.next_power_of_2(half)
    return {
        "GELU": activation == "gelu_tanh",
        "BLOCK": block,
        "ROOT": ROOT,
        "CUBE": CUBE,
        "num_warps": min(16, max(1, block // 1024)),
    }
