"""Ranks at which methods train equally many values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from mtl_lora_cli.adapters.methods.base import Settings
from mtl_lora_cli.errors import UsageError

TOLERANCE = 0.02
_LARGEST_RANK = 1 << 20


def alpha_at(rank: int, alpha: float, own_rank: int, scaling: str) -> float:
    """The alpha that keeps the scale of the update at another rank.

    s = alpha / r, so alpha' = alpha r' / r; with `scaling: sqrt_rank` alpha' = alpha √(r' / r).
    """
    ratio = rank / own_rank
    return alpha * (math.sqrt(ratio) if scaling == "sqrt_rank" else ratio)


def count_at(
    config: Settings, shapes: Mapping[str, tuple[int, ...]], tasks: int
) -> Callable[[int], int]:
    """rank → trained values of this adapter."""
    return lambda rank: config.changed(rank=rank).count(shapes, tasks)


def match_rank(name: str, count: Callable[[int], int], target: int, step: int = 1) -> int:
    """The rank whose count is nearest to the target; of two equally near ones the lower.

    Args:
        name: of the method, for the error.
        count: rank → trained values, strictly rising.
        target: trained values to come near to.
        step: only multiples of it are ranks.

    Raises:
        UsageError: the nearest count is more than 2 % off.
    """
    above = 1
    while count(above * step) < target and above < _LARGEST_RANK:
        above *= 2
    below = above // 2  # count(below) < target <= count(above), where below is a rank at all
    while above - below > 1:
        middle = (below + above) // 2
        if count(middle * step) < target:
            below = middle
        else:
            above = middle
    near = [rank * step for rank in (below, above) if rank > 0]
    best = min(near, key=lambda rank: (abs(count(rank) - target), rank))
    if abs(count(best) - target) > TOLERANCE * target:
        shown = ", ".join(
            f"rank {rank} has {count(rank):,} ({count(rank) / target - 1:+.1%})" for rank in near
        )
        raise UsageError(
            f"{name} cannot come within {TOLERANCE:.0%} of {target:,} trained values: "
            f"{shown}{'' if len(near) > 1 else ', and there is none below it'}"
        )
    return best


def common_target(counts: Sequence[tuple[Callable[[int], int], int]], target: int) -> int | None:
    """The number nearest to the target that every method comes within 2 % of; None from half of it
    to twice as much.

    Args:
        counts: of each method rank → trained values, and the step of its ranks.
        target: where to look.
    """
    near = []
    for count, step in counts:
        rank = step
        values = []
        while (value := count(rank)) <= 2 * target:
            values.append(value)
            rank += step
        near.append([value for value in values if 2 * value >= target])
    fits = (
        value
        for values in near
        for value in values
        if all(any(abs(other - value) <= TOLERANCE * value for other in others) for others in near)
    )
    return min(fits, key=lambda value: (abs(value - target), value), default=None)
