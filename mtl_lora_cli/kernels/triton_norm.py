"""Triton kernels of `norm.py`: a program a row, the row in registers, every tensor touched once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtl_lora_cli.kernels.backend import roomy


@triton.jit
def _add_norm(
    x,
    delta,
    weight,
    total,
    normed,
    inverse,
    width,
    stride,
    eps,
    ADD: tl.constexpr,
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
    tl.store(
        normed + row * stride + at,
        (value * factor * scale).to(normed.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _apply_norm(x, inverse, weight, normed, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    out = value * tl.load(inverse + row) * scale
    tl.store(normed + row * stride + at, out.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _norm_gradient(
    dh,
    dresidual,
    x,
    inverse,
    weight,
    dx,
    width,
    residual_stride,
    stride,
    ADD: tl.constexpr,
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
    tl.store(dx + row * stride + at, out.to(dx.dtype.element_ty), mask=inside)


def launch(width: int) -> dict[str, Any]:
    """The shape of a program that holds a row."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `norm.add_norm`; x and delta contiguous, rows of at most 65,536."""
    rows, width = x.shape
    total = x if delta is None else torch.empty_like(x)
    normed = roomy(x, rows, width, room)
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        _add_norm[(rows,)](
            x,
            delta,
            weight,
            total,
            normed,
            inverse,
            width,
            normed.stride(0),
            eps,
            ADD=delta is not None,
            **launch(width),
        )
    return total, normed, inverse


def apply_norm(x: Tensor, inverse: Tensor, weight: Tensor, room: int) -> Tensor:
    """See `norm.apply_norm`."""
    rows, width = x.shape
    normed = roomy(x, rows, width, room)
    if rows:
        _apply_norm[(rows,)](x, inverse, weight, normed, width, normed.stride(0), **launch(width))
    return normed


def norm_gradient(
    dh: Tensor, dresidual: Tensor | None, x: Tensor, inverse: Tensor, weight: Tensor, room: int
) -> Tensor:
    """See `norm.norm_gradient`; all but dresidual contiguous."""
    rows, width = x.shape
    dx = roomy(x, rows, width, room)
    if rows:
        _norm_gradient[(rows,)](
            dh,
            dresidual,
            x,
            inverse,
            weight,
            dx,
            width,
            0 if dresidual is None else dresidual.stride(0),
            dx.stride(0),
            ADD=dresidual is not None,
            **launch(width),
        )
    return dx
