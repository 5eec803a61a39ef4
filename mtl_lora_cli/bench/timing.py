"""Whole training steps by the clock, and the memory that they take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.machine.cards import peak_gib, reset_peak, synchronize

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Timing:
    """Timed steps.

    Attributes:
        tokens: real tokens of each step, never padding.
        seconds: of each step.
        losses: of each step, the mean over its supervised tokens.
        peak_memory_gib: most memory ever allocated in the steps, warm-up included; None on a CPU.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    peak_memory_gib: float | None

    @property
    def tokens_per_second(self) -> float:
        """The median step's."""
        return median(self._rates())

    def _rates(self) -> list[float]:
        return [count / spent for count, spent in zip(self.tokens, self.seconds, strict=True)]

    def to_json(self) -> dict[str, Any]:
        rates = self._rates()
        return {
            "tokens": list(self.tokens),
            "seconds": list(self.seconds),
            "losses": list(self.losses),
            "loss": self.losses[-1],
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_min": min(rates),
            "tokens_per_second_max": max(rates),
            "tokens_per_second_overall": sum(self.tokens) / sum(self.seconds),
            "peak_memory_gib": self.peak_memory_gib,
        }


def time_steps(
    step: Callable[[Batch], Tensor],
    batches: Sequence[Batch],
    tokens: Callable[[Batch], int],
    *,
    warmup: int,
    device: torch.device,
) -> Timing:
    """Run all steps and time those after the warm-up.

    A step's time is from its predecessor's end to its own. As in training, the next step is asked
    for before the last one is waited for.

    Args:
        step: one whole optimiser step; returns its loss, which may still be being computed.
        batches: what each step is given.
        tokens: real tokens in it.
        warmup: steps at the beginning that are not timed.
        device: where the steps run.

    Raises:
        MtlLoraError: a loss is no finite number.
    """
    reset_peak(device)
    marks, losses = [_mark(device)], []
    for batch in batches:
        losses.append(step(batch))
        marks.append(_mark(device))
        if len(losses) > 1:
            _require_finite(losses[-2], len(losses) - 1)
    _require_finite(losses[-1], len(losses))
    synchronize(device)
    seconds = [_between(one, two) for one, two in pairwise(marks)]
    return Timing(
        tokens=tuple(tokens(batch) for batch in batches[warmup:]),
        seconds=tuple(seconds[warmup:]),
        losses=tuple(float(loss) for loss in losses[warmup:]),
        peak_memory_gib=peak_gib(device),
    )


def _require_finite(loss: Tensor, step: int) -> None:
    if not math.isfinite(float(loss)):
        raise MtlLoraError(f"the loss is not a finite number in step {step}")


def _mark(device: torch.device) -> Any:
    """A point in the device's own time."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(one: Any, two: Any) -> float:
    return two - one if isinstance(one, float) else one.elapsed_time(two) / 1000
