"""Triton kernels of `rounding.py`: a program a row, which it holds in registers until its largest magnitude is known."""

from __future__ import annotations

from typing import Any, NamedTuple

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
WIDE = 8192  # from which on a program is alone on its multiprocessor, or nearly so


@triton.jit
def _read(x, row, width, start, at, inside):
    """Part of a row."""
    return tl.load(x + row * width + start + at, mask=inside, other=0.0)


@triton.jit
def _gated_rows(
    both, exact, values, scale, rows, half,
    GELU: tl.constexpr, EXACT: tl.constexpr, EIGHT: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr, ROOT: tl.constexpr, CUBE: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    inside = at < half
    mine, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    if AHEAD:
        next_gate = _read(both, mine, 2 * half, 0, at, inside)
        next_up = _read(both, mine, 2 * half, half, at, inside)
    for row in tl.range(mine, rows, step, num_stages=STAGES):
        if AHEAD:
            gate, up = next_gate, next_up
            later = tl.minimum(row + step, rows - 1)
            next_gate = _read(both, later, 2 * half, 0, at, inside)
            next_up = _read(both, later, 2 * half, half, at, inside)
        else:
            gate = _read(both, row, 2 * half, 0, at, inside)
            up = _read(both, row, 2 * half, half, at, inside)
        value = active_of(gate.to(tl.float32), GELU, ROOT, CUBE) * up.to(tl.float32)
        put_row(value, exact, values, scale, row, at, inside, half, half, EXACT, EIGHT)


@triton.jit
def _gated_gradient_rows(
    da, both, exact, values, scale, out, rows, half,
    GELU: tl.constexpr, AGAIN: tl.constexpr, EXACT: tl.constexpr, EIGHT: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, ROOT: tl.constexpr,
    CUBE: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    inside = at < half
    mine, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    if AHEAD:
        next_gate = _read(both, mine, 2 * half, 0, at, inside)
        next_up = _read(both, mine, 2 * half, half, at, inside)
        next_gradient = _read(da, mine, half, 0, at, inside)
    for row in tl.range(mine, rows, step, num_stages=STAGES):
        if AHEAD:
            gate, up, gradient = next_gate, next_up, next_gradient
            later = tl.minimum(row + step, rows - 1)
            next_gate = _read(both, later, 2 * half, 0, at, inside)
            next_up = _read(both, later, 2 * half, half, at, inside)
            next_gradient = _read(da, later, half, 0, at, inside)
        else:
            gate = _read(both, row, 2 * half, 0, at, inside)
            up = _read(both, row, 2 * half, half, at, inside)
            gradient = _read(da, row, half, 0, at, inside)
        first = row * 2 * half + at
        second = first + half
        gate, up, gradient = gate.to(tl.float32), up.to(tl.float32), gradient.to(tl.float32)
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
        how = launch(both, half, tensors=2)
        _gated_rows[(min(rows, how.programs),)](
            both, *made.pointers, rows, half, **made.flags, **how.named, **_named(activation)
        )
    return made.rounded()


def gated_gradient(
    da: Tensor, both: Tensor, activation: Activation, form: Form, *, again: bool
) -> tuple[Rounded, Tensor | None]:
    """See `rounding.gated_gradient`; contiguous. The exact gradient is written over [g | u]."""
    rows, half = da.shape
    made = Targets(both, rows, 2 * half, 0, form, given=None if form == "eight" else both)
    out = torch.empty_like(da) if again else None
    if rows:
        how = launch(both, half, tensors=3)
        _gated_gradient_rows[(min(rows, how.programs),)](
            da, both, *made.pointers, out, rows, half,
            AGAIN=again, **made.flags, **how.named, **_named(activation),
        )  # fmt: skip
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


class Launch(NamedTuple):
    """How rows of an activation are dealt out.

    Attributes:
        programs: at most.
        named: arguments of the kernels.
    """

    programs: int
    named: dict[str, Any]


def launch(both: Tensor, half: int, *, tensors: int) -> Launch:
    """A program a row; where one fills a multiprocessor, it takes row after row, and reads the next one meanwhile.

    Args:
        both: what is read.
        half: features of a row.
        tensors: how many such rows are read together.
    """
    block = triton.next_power_of_2(half)
    warps = min(16, max(1, block // 1024))
    named = {"BLOCK": block, "STAGES": 1, "AHEAD": False, "num_warps": warps}
    needed = 2 * tensors * block * both.element_size()
    if not both.is_cuda or block < WIDE:
        return Launch(2**31 - 1, named)
    card = torch.cuda.get_device_properties(both.device)
    if needed > card.shared_memory_per_block_optin - 2**13:
        return Launch(2**31 - 1, named)
    many = max(1, card.shared_memory_per_multiprocessor // (needed + 2**13))
    return Launch(many * card.multi_processor_count, named | {"STAGES": 2})


def _named(activation: Activation) -> dict[str, Any]:
    return {"GELU": activation == "gelu_tanh", "ROOT": ROOT, "CUBE": CUBE}
