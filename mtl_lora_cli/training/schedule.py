"""The learning rate as a function of the step alone, so that nothing has to be saved for it."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """Multiplier of the peak learning rate at optimiser step `step`, counted from 0.

    Linear warm-up over ⌈warmup · total⌉ steps, then with progress p in [0, 1] to the end:
    `cosine` (1 + cos πp) / 2, `linear` 1 − p, `constant` 1.

    Raises:
        ValueError: an unknown schedule.
    """
    warm = math.ceil(warmup * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = (step - warm) / max(1, total - warm)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1 - progress
    if schedule == "constant":
        return 1.0
    raise ValueError(f"unknown schedule '{schedule}'")
