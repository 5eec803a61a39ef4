"""Triton kernels of `expert_gate.py`: every value read once and written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtl_lora_cli.kernels.clamped import Clamped
from mtl_lora_cli.kernels.expert_gate import ExpertActivation
from mtl_lora_cli.kernels.gated import CUBE, ROOT

_BLOCK = 1024


@triton.jit
def _expert_gated(
    both, values, out, half, gate_step, up_start, alpha, limit,
    KIND: tl.constexpr, BLOCK: tl.constexpr, ROOT: tl.constexpr, CUBE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < half
    place = both + row * 2 * half + at * gate_step
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + up_start, mask=inside, other=0.0).to(tl.float32)
    share = tl.load(values + row).to(tl.float32)
    if KIND == 0:
        value = gate * tl.sigmoid(gate) * up
    elif KIND == 1:
        value = gate * tl.sigmoid(2.0 * ROOT * gate * (1.0 + CUBE * gate * gate)) * up
    else:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        value = (up + 1.0) * gate * tl.sigmoid(alpha * gate)
    tl.store(out + row * half + at, (share * value).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _expert_gated_gradient(
    da, both, values, through, out, half, gate_step, up_start, alpha, limit,
    KIND: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr, ROOT: tl.constexpr,
    CUBE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    share = tl.load(values + row).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, half, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < half
        place = both + row * 2 * half + at * gate_step
        gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(place + up_start, mask=inside, other=0.0).to(tl.float32)
        gradient = share * tl.load(da + row * half + at, mask=inside, other=0.0).to(tl.float32)
        if KIND == 0:
            sigmoid = tl.sigmoid(gate)
            active = gate * sigmoid
            value = active * up
            dgate = gradient * up * sigmoid * (1.0 + gate - active)
            dup = gradient * active
        elif KIND == 1:
            square = gate * gate
            sigmoid = tl.sigmoid(2.0 * ROOT * gate * (1.0 + CUBE * square))
            active = gate * sigmoid
            value = active * up
            slope = sigmoid + 2.0 * ROOT * active * (1.0 - sigmoid) * (1.0 + 3.0 * CUBE * square)
            dgate = gradient * up * slope
            dup = gradient * active
        else:
            low_gate = tl.minimum(gate, limit)
            low_up = tl.minimum(tl.maximum(up, -limit), limit)
            sigmoid = tl.sigmoid(alpha * low_gate)
            active = low_gate * sigmoid
            value = (low_up + 1.0) * active
            dgate = gradient * (low_up + 1.0) * sigmoid * (1.0 + alpha * (low_gate - active))
            dgate = tl.where(gate <= limit, dgate, 0.0)
            dup = tl.where((up <= limit) & (up >= -limit), gradient * active, 0.0)
        total += tl.where(inside, gradient * value, 0.0)
        tl.store(place, dgate.to(both.dtype.element_ty), mask=inside)
        tl.store(place + up_start, dup.to(both.dtype.element_ty), mask=inside)
        if AGAIN:
            tl.store(out + row * half + at, (share * value).to(out.dtype.element_ty), mask=inside)
    tl.store(through + row, tl.sum(total, axis=0).to(through.dtype.element_ty))


def _launch(activation: ExpertActivation) -> dict[str, Any]:
    own = isinstance(activation, Clamped)
    return {
        "alpha": activation.alpha if isinstance(activation, Clamped) else 0.0,
        "limit": activation.limit if isinstance(activation, Clamped) else 0.0,
        "KIND": 2 if own else 1 if activation == "gelu_tanh" else 0,
        "BLOCK": _BLOCK,
        "ROOT": ROOT,
        "CUBE": CUBE,
        "num_warps": 4,
    }


def _places(activation: ExpertActivation, half: int) -> tuple[int, int]:
    """How far gates stand apart, and where a gate's up stands behind it."""
    return (2, 1) if isinstance(activation, Clamped) else (1, half)


def expert_gated(both: Tensor, values: Tensor, activation: ExpertActivation) -> Tensor:
    """See `expert_gate.expert_gated`; contiguous."""
    rows, half = both.shape[0], both.shape[1] // 2
    out = both.new_empty(rows, half)
    if rows:
        grid = (rows, triton.cdiv(half, _BLOCK))
        _expert_gated[grid](
            both, values, out, half, *_places(activation, half), **_launch(activation)
        )
    return out


def expert_gated_gradient(
    da: Tensor, both: Tensor, values: Tensor, activation: ExpertActivation, *, again: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `expert_gate.expert_gated_gradient`; contiguous, and written over gates and ups."""
    rows, half = da.shape
    out = torch.empty_like(da) if again else None
    through = torch.empty_like(values)
    if rows:
        _expert_gated_gradient[(rows,)](
            da, both, values, through, out if again else da, half, *_places(activation, half),
            AGAIN=again, **_launch(activation),
        )  # fmt: skip
    return both, through, out
