"""What the arithmetic alone would take: the floor under every step.

A frozen model needs 2N for the forward pass and 2N for the gradient of the inputs, and no gradient
of its weights; the head of H weights is needed at supervised tokens only. Per token

    F = 4 N + 4 H σ        σ = supervised tokens / tokens

and at a rate of R FLOP/s no more than R / F tokens/s are possible. Attention, norms, adapters and
optimiser are left out: they are what a faster program could hide, or nearly so. FP8 products run at
up to twice the 16-bit rate; the floor stays that of 16 bit, and FP8 may fall below it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

# FLOP/s that the card's own bf16 products reached when it was measured with care, by a part of its
# name: a figure that does not move with the day.
KNOWN_RATES = {"H100 80GB HBM3": 780e12}


@dataclass(frozen=True)
class Rate:
    """How fast this device multiplies matrices.

    Attributes:
        product: what was measured.
        measured: FLOP/s, the median of several products.
        known: FLOP/s from `KNOWN_RATES`, or None.
    """

    product: str
    measured: float
    known: float | None


@dataclass(frozen=True)
class Floor:
    """The floor of one run on cards that are known.

    Attributes:
        layer_weights, head_weights: N and H.
        rate: R of all cards together, FLOP/s.
    """

    layer_weights: int
    head_weights: int
    rate: float

    def share(self, tokens_per_second: float, supervised_share: float) -> float:
        """How much of the possible speed is reached: tokens/s · F / R."""
        flop = flop_per_token(self.layer_weights, self.head_weights, supervised_share)
        return tokens_per_second * flop / self.rate


def floor_of(
    layer_weights: int, head_weights: int, device: torch.device, cards: int
) -> Floor | None:
    """The floor of a model; None on cards that are not known.

    Args:
        layer_weights, head_weights: N and H.
        device: a card like all others.
        cards: how many work on a step.
    """
    rate = known_rate(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if rate is None else Floor(layer_weights, head_weights, rate * cards)


def flop_per_token(layer_weights: int, head_weights: int, supervised_share: float) -> float:
    """F = 4 N + 4 H σ, in FLOP.

    Args:
        layer_weights: N, weights of matrix products in the layers.
        head_weights: H, weights of the head.
        supervised_share: σ, supervised tokens of all tokens.
    """
    return 4.0 * layer_weights + 4.0 * head_weights * supervised_share


def known_rate(name: str) -> float | None:
    """The figure for a card of this name."""
    return next((rate for part, rate in KNOWN_RATES.items() if part in name), None)


def measure_rate(device: torch.device) -> Rate:
    """Multiply square matrices of random numbers: 8192³ in bf16 on a card, 1024³ in float32 else."""
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    seconds = []
    for number in range(25 if cuda else 8):
        started = _now(device)
        torch.mm(left, right, out=out)
        if number >= 3:  # the first ones choose the kernel and wake the card
            seconds.append(_now(device) - started)
        else:
            _now(device)
    name = torch.cuda.get_device_name(device) if cuda else ""
    kind = str(dtype).removeprefix("torch.")
    return Rate(f"{size}³ {kind}", 2.0 * size**3 / median(seconds), known_rate(name))


def _now(device: torch.device) -> float:
    """Seconds, once everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def floor_json(rate: Rate, flop: float) -> dict[str, Any]:
    """The floor in tokens/s, at the measured and at the known rate."""
    return {
        "flop_per_token": flop,
        "tokens_per_second": rate.measured / flop,
        "known_tokens_per_second": None if rate.known is None else rate.known / flop,
    }
