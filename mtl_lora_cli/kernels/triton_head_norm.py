"""Triton kernels of `head_norm.py`: a program a position, all its heads in registers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtl_lora_cli.kernels.head_norm import HeadNorms


@triton.jit
def _head_norm(x, weight, out, stride, parts, width, eps, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    at = tl.arange(0, PARTS)[:, None] * width + column
    inside = (at < parts * width) & (column < width)
    value = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)
    normed = value * inverse[:, None] * scale
    tl.store(out + row * stride + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _head_norm_gradient(
    dh, dh_stride, x, weight, stride, parts, width, eps, PARTS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    at = tl.arange(0, PARTS)[:, None] * width + column
    inside = (at < parts * width) & (column < width)
    value = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)[:, None]
    unit = value * inverse
    dunit = tl.load(dh + row * dh_stride + at, mask=inside, other=0.0).to(tl.float32)
    dunit *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    dx = inverse * (dunit - unit * (tl.sum(dunit * unit, axis=1) / width)[:, None])
    tl.store(dh + row * dh_stride + at, dx.to(dh.dtype.element_ty), mask=inside)


def head_norm(qkv: Tensor, norms: HeadNorms, *, heads: int, key_heads: int) -> Tensor:
    """See `head_norm.head_norm`; contiguous."""
    out = torch.empty_like(qkv)
    first = 0
    for weight, width in _parts(qkv, norms, heads, key_heads):
        x, place = qkv[:, first:], out[:, first:]
        parts = width // weight.shape[0]
        if len(qkv):
            _head_norm[(len(qkv),)](
                x, weight, place, qkv.stride(0), parts, weight.shape[0], norms.eps,
                **_launch(parts, weight.shape[0]),
            )  # fmt: skip
        first += width
    out[:, first:].copy_(qkv[:, first:])
    return out


def head_norm_gradient_(
    dqkv: Tensor, qkv: Tensor, norms: HeadNorms, *, heads: int, key_heads: int
) -> Tensor:
    """See `head_norm.head_norm_gradient_`; qkv contiguous."""
    first = 0
    for weight, width in _parts(qkv, norms, heads, key_heads):
        parts = width // weight.shape[0]
        if len(qkv):
            _head_norm_gradient[(len(qkv),)](
                dqkv[:, first:], dqkv.stride(0), qkv[:, first:], weight, qkv.stride(0), parts,
                weight.shape[0], norms.eps, **_launch(parts, weight.shape[0]),
            )  # fmt: skip
        first += width
    return dqkv


def _parts(
    qkv: Tensor, norms: HeadNorms, heads: int, key_heads: int
) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
    """Each weight, and the columns that it serves."""
    dim = qkv.shape[1] // (heads + 2 * key_heads)
    return (norms.q, heads * dim), (norms.k, key_heads * dim)


def _launch(parts: int, width: int) -> dict[str, Any]:
    rows, columns = triton.next_power_of_2(parts), triton.next_power_of_2(width)
    warps = min(16, max(1, rows * columns // 1024))
    return {"PARTS": rows, "WIDTH": columns, "num_warps": warps}
