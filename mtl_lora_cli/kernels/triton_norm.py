"""Triton kernels of `norm.py`: a program a row, the row in registers, every tensor touched once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtl_lora_cli.kernels.fp8 import Form
from mtl_lora_cli.kernels.triton_fp8 import Targets, put_row


@triton.jit
def _add_norm(
    x,
    delta,
    weight,
    total,
    normed,
    values,
    rows_scale,
    inverse,
    width,
    stride,
    eps,
    ADD: tl.constexpr,
    EXACT: tl.constexpr,
    EIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0)
    if ADD:
        value += tl.load(delta + row * width + at, mask=inside, other=0.0)
        tl.store(total + row * width + at, value, mask=inside)
    value = value.to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    tl.store(inverse + row, factor)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    value = value * factor * scale
    put_row(value, normed, values, rows_scale, row, at, inside, width, stride, EXACT, EIGHT)


@triton.jit
def _apply_norm(
    x, inverse, weight, normed, values, rows_scale, width, stride,
    EXACT: tl.constexpr, EIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    out = value * tl.load(inverse + row) * scale
    put_row(out, normed, values, rows_scale, row, at, inside, width, stride, EXACT, EIGHT)


@triton.jit
def _norm_gradient(
    dh,
    dresidual,
    x,
    inverse,
    weight,
    dx,
    values,
    rows_scale,
    width,
    residual_stride,
    stride,
    ADD: tl.constexpr,
    EIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    factor = tl.load(inverse + row)
    unit = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32) * factor
    weighted = tl.load(dh + row * width + at, mask=inside, other=0.0).to(tl.float32)
    weighted *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    out = factor * (weighted - unit * (tl.sum(weighted * unit, axis=0) / width))
    if ADD:
        out += tl.load(dresidual + row * residual_stride + at, mask=inside, other=0.0).to(
            tl.float32
        )
    put_row(out, dx, values, rows_scale, row, at, inside, width, stride, True, EIGHT)


def launch(width: int) -> dict[str, Any]:
    """The shape of a program that holds a row."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, room: int, form: Form = "exact"
) -> tuple[Tensor, Targets, Tensor]:
    """See `norm.add_norm`; x and delta contiguous, rows of at most 65,536."""
    rows, width = x.shape
    total = x if delta is None else torch.empty_like(x)
    normed = Targets(x, rows, width, room, form)
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        _add_norm[(rows,)](
            x, delta, weight, total, *normed.pointers, inverse, width, normed.stride, eps,
            ADD=delta is not None, **normed.flags, **launch(width),
        )  # fmt: skip
    return total, normed, inverse


def apply_norm(
    x: Tensor, inverse: Tensor, weight: Tensor, room: int, form: Form = "exact"
) -> Targets:
    """See `norm.apply_norm`."""
    rows, width = x.shape
    normed = Targets(x, rows, width, room, form)
    if rows:
        _apply_norm[(rows,)](
            x, inverse, weight, *normed.pointers, width, normed.stride,
            **normed.flags, **launch(width),
        )  # fmt: skip
    return normed


def norm_gradient(
    dh: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    inverse: Tensor,
    weight: Tensor,
    room: int,
    form: Form = "exact",
) -> Targets:
    """See `norm.norm_gradient`; all but dresidual contiguous. The exact form is always made."""
    rows, width = x.shape
    dx = Targets(x, rows, width, room, "exact" if form == "exact" else "both")
    if rows:
        _norm_gradient[(rows,)](
            dh, dresidual, x, inverse, weight, *dx.pointers, width,
            0 if dresidual is None else dresidual.stride(0), dx.stride,
            ADD=dresidual is not None, EIGHT=dx.rows is not None, **launch(width),
        )  # fmt: skip
    return dx
