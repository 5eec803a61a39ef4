"""Triton kernels of `stream.py`: a program a row, the row in registers for both norms and the addition."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtl_lora_cli.kernels.fp8 import Form
from mtl_lora_cli.kernels.stream import After, Entry, Norm
from mtl_lora_cli.kernels.triton_fp8 import Targets, put_row
from mtl_lora_cli.kernels.triton_norm import launch


@triton.jit
def _norm_add_norm(
    x, out, after, weight, total, normed, values, rows_scale, inverse, out_inverse, width, stride,
    after_eps, eps, multiplier,
    AFTER: tl.constexpr, BEFORE: tl.constexpr, COPY: tl.constexpr,
    EXACT: tl.constexpr, EIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    stream = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(out + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if AFTER:
        factor = tl.rsqrt(tl.sum(added * added, axis=0) / width + after_eps)
        tl.store(out_inverse + row, factor)
        added *= tl.load(after + at, mask=inside, other=0.0).to(tl.float32) * factor
    value = (stream + added * multiplier).to(total.dtype.element_ty)
    tl.store(total + row * width + at, value, mask=inside)
    if BEFORE:  # of the sum as it is kept: the backward pass reads that
        wide = value.to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
        tl.store(inverse + row, factor)
        wide *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) * factor
        put_row(wide, normed, values, rows_scale, row, at, inside, width, stride, EXACT, EIGHT)
    elif COPY:
        wide = value.to(tl.float32)
        put_row(wide, normed, values, rows_scale, row, at, inside, width, stride, EXACT, EIGHT)


@triton.jit
def _norm_add_norm_gradient(
    dh, dresidual, total, inverse, weight, out, out_inverse, after, dx, dout, values, rows_scale,
    width, residual_stride, stride, multiplier,
    ADD: tl.constexpr, AFTER: tl.constexpr, BEFORE: tl.constexpr, EIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    gradient = tl.load(dh + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if BEFORE:
        factor = tl.load(inverse + row)
        unit = tl.load(total + row * width + at, mask=inside, other=0.0).to(tl.float32) * factor
        gradient *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        gradient = factor * (gradient - unit * (tl.sum(gradient * unit, axis=0) / width))
    if ADD:
        residual = tl.load(dresidual + row * residual_stride + at, mask=inside, other=0.0)
        gradient += residual.to(tl.float32)
    tl.store(dx + row * width + at, gradient.to(dx.dtype.element_ty), mask=inside)
    gradient *= multiplier
    if AFTER:
        factor = tl.load(out_inverse + row)
        unit = tl.load(out + row * width + at, mask=inside, other=0.0).to(tl.float32) * factor
        gradient *= tl.load(after + at, mask=inside, other=0.0).to(tl.float32)
        gradient = factor * (gradient - unit * (tl.sum(gradient * unit, axis=0) / width))
    put_row(gradient, dout, values, rows_scale, row, at, inside, width, stride, True, EIGHT)


def enter(
    x: Tensor, out: Tensor, after: After, norm: Norm | None, room: int, form: Form = "exact"
) -> tuple[Entry, Targets]:
    """See `stream.enter`; x and out contiguous, rows of at most 65,536. Without norm and room h is x' itself."""
    rows, width = x.shape
    total = torch.empty_like(x)
    apart = norm is not None or room > 0 or form != "exact"
    h = Targets(x, rows, width, room, form, given=None if apart else total)
    inverse = None if norm is None else _a_row_each(x)
    out_inverse = None if after.norm is None else _a_row_each(x)
    if rows:
        _norm_add_norm[(rows,)](
            x, out, _weight(after.norm), _weight(norm), total, *h.pointers, inverse, out_inverse,
            width, h.stride, _eps(after.norm), _eps(norm), after.multiplier,
            AFTER=after.norm is not None, BEFORE=norm is not None, COPY=apart, **h.flags,
            **launch(width),
        )  # fmt: skip
    return Entry(total, inverse, None if out_inverse is None else out, out_inverse), h


def enter_gradient(
    dh: Tensor,
    dresidual: Tensor | None,
    entry: Entry,
    after: After,
    norm: Norm | None,
    room: int,
    form: Form = "exact",
) -> tuple[Tensor, Targets]:
    """See `stream.enter_gradient`; all but dresidual contiguous. The exact gradient of o is always made."""
    total, inverse, out, out_inverse = entry
    rows, width = total.shape
    dx = torch.empty_like(total)
    dout = Targets(total, rows, width, room, "exact" if form == "exact" else "both")
    if rows:
        _norm_add_norm_gradient[(rows,)](
            dh, dresidual, total, inverse, _weight(norm), out, out_inverse, _weight(after.norm), dx,
            *dout.pointers, width, 0 if dresidual is None else dresidual.stride(0), dout.stride,
            after.multiplier, ADD=dresidual is not None, AFTER=out is not None,
            BEFORE=inverse is not None, EIGHT=dout.rows is not None, **launch(width),
        )  # fmt: skip
    return dx, dout


def _a_row_each(x: Tensor) -> Tensor:
    return torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


def _weight(norm: Norm | None) -> Tensor | None:
    return None if norm is None else norm.weight


def _eps(norm: Norm | None) -> float:
    return 0.0 if norm is None else norm.eps
