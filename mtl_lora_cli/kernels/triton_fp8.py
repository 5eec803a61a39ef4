"""Triton kernel of `fp8.py`: a program a row, twice over it; the second time it is in the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST = tl.constexpr(448.0)
_BLOCK = 4096


@triton.jit
def _fp8_rows(x, values, scale, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    factor = tl.maximum(tl.max(largest, axis=0), 1e-12) / _LARGEST
    tl.store(scale + row, factor)
    inverse = 1.0 / factor
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < width, other=0.0).to(tl.float32) * inverse
        value = tl.minimum(tl.maximum(value, -_LARGEST), _LARGEST)
        tl.store(values + row * width + at, value.to(tl.float8e4nv), mask=at < width)


def to_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `fp8.to_rows`; rows may lie apart."""
    rows, width = x.shape
    values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows:
        _fp8_rows[(rows,)](x, values, scale, x.stride(0), width, BLOCK=_BLOCK, num_warps=8)
    return values, scale
