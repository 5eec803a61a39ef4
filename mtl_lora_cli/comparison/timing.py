"""Whole training steps by the clock, and the memory that they take."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch

from mtl_lora_cli.errors import MtlLoraError

Batch = TypeVar("Batch")
GIB = 2**30


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
    step: Callable[[Batch], float],
    batches: Sequence[Batch],
    tokens: Callable[[Batch], int],
    *,
    warmup: int,
    device: torch.device,
) -> Timing:
    """Run all steps and time those after the warm-up.

    Args:
        step: one whole optimiser step; returns its loss.
        batches: what each step is given.
        tokens: real tokens in it.
        warmup: steps at the beginning that are not timed.
        device: which is waited for before the clock is read.

    Raises:
        MtlLoraError: a loss is no finite number.
    """
    reset_peak(device)
    seconds, losses = [], []
    for number, batch in enumerate(batches):
        synchronize(device)
        started = time.perf_counter()
        loss = step(batch)
        synchronize(device)
        spent = time.perf_counter() - started
        if not math.isfinite(loss):
            raise MtlLoraError(f"the loss is not a finite number in step {number + 1}")
        if number >= warmup:
            seconds.append(spent)
            losses.append(loss)
    timed = [tokens(batch) for batch in batches[warmup:]]
    return Timing(tuple(timed), tuple(seconds), tuple(losses), peak_gib(device))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what nothing holds any more, so that the next case starts with the whole card."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Start counting the peak anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Most memory allocated since the last reset, GiB."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
