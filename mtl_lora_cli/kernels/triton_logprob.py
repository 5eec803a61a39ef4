"""Triton kernels of `logprob.py`: a program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _logit_normaliser(logits, out, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    largest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(logits + at, mask=at < width, other=float("-inf")).to(tl.float32)
        above = tl.maximum(largest, value)
        # A lane that has seen nothing yet: −inf − (−inf) is no number.
        known = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(largest - known) + tl.exp(value - known)
        largest = above
    most = tl.max(largest, axis=0)
    tl.store(out + row, most + tl.log(tl.sum(total * tl.exp(largest - most), axis=0)))


@triton.jit
def _logit_gradient(logits, normaliser, weight, out, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(logits + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.exp(value - tl.load(normaliser + row)) * -tl.load(weight + row)
    tl.store(out + row * stride + at, share.to(out.dtype.element_ty), mask=inside)


def normaliser(logits: Tensor) -> Tensor:
    """log Σ_v exp L[u, v], float32 [U]."""
    rows, width = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _logit_normaliser[(rows,)](logits, out, logits.stride(0), width, BLOCK=_BLOCK, num_warps=8)
    return out


def minus_softmax(logits: Tensor, normaliser: Tensor, weight: Tensor) -> Tensor:
    """−weight_u softmax(L_u), written over the logits."""
    rows, width = logits.shape
    if rows:
        _logit_gradient[(rows, triton.cdiv(width, _BLOCK))](
            logits, normaliser, weight, logits, logits.stride(0), width, BLOCK=_BLOCK, num_warps=8
        )
    return logits
