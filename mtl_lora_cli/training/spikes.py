"""Spikes: steps whose gradient is many times what it is usually, and the tasks whose loss rose with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

TIMES = 5.0  # the usual norm
WINDOW = 50  # steps before, whose median is usual
FEWEST = 20  # steps; before so many nothing is usual
_RAISED = 1.5  # times its usual loss: a task that had part in it
_SHOWN = 5  # steps, and tasks of one

Step = Mapping[str, Any]


@dataclass(frozen=True)
class Spike:
    """A step whose gradient norm is more than five times the median of the fifty steps before.

    Attributes:
        step: counted from 1.
        norm: of its gradients, before clipping.
        usual: that median.
        tasks: with rows in the step whose loss was half as high again as the median of their own steps
            before, the highest rise first; all of the step's tasks where none was.
    """

    step: int
    norm: float
    usual: float
    tasks: tuple[str, ...]

    @property
    def times(self) -> float:
        """Norm over the usual one."""
        return self.norm / self.usual


def spikes(events: Iterable[Mapping[str, Any]]) -> list[Spike]:
    """Those of a run, from its metrics.jsonl; what is no step, or has no norm, is passed over."""
    steps = [
        event
        for event in events
        if event.get("event") == "step" and isinstance(event.get("gradient_norm"), int | float)
    ]
    found = []
    for place, step in enumerate(steps):
        before = steps[max(0, place - WINDOW) : place]
        if len(before) < FEWEST:
            continue
        usual = median(one["gradient_norm"] for one in before)
        if step["gradient_norm"] > TIMES * usual > 0:
            found.append(Spike(step["step"], step["gradient_norm"], usual, _tasks(step, before)))
    return found


def _tasks(step: Step, before: Sequence[Step]) -> tuple[str, ...]:
    losses = step.get("task_loss") or {}
    rises = {}
    for task, loss in losses.items():
        known = [one["task_loss"][task] for one in before if task in (one.get("task_loss") or {})]
        if known and loss > _RAISED * median(known):
            rises[task] = loss / max(median(known), 1e-9)
    return tuple(sorted(rises, key=lambda task: -rises[task])) or tuple(losses)


def told(found: Sequence[Spike], steps: int, *, clipped: bool) -> Iterator[str]:
    """A line for the person who trained: how many, when, and which tasks' rows.

    Args:
        found: the run's spikes.
        steps: that it took.
        clipped: whether it clips by each tensor's own history.
    """
    if not found:
        return
    highest = sorted(sorted(found, key=lambda one: -one.times)[:_SHOWN], key=lambda one: one.step)
    shown = "; ".join(
        f"step {one.step} ({one.times:.0f} times, rows of {_named(one.tasks)})" for one in highest
    )
    yield (
        f"{len(found)} of {steps} steps had a gradient more than {TIMES:g} times the usual: {shown}"
        f"{' and others' if len(found) > len(highest) else ''}"
        + ("" if clipped else "; training.clipping=true holds each tensor to its own history")
    )


def _named(tasks: Sequence[str]) -> str:
    more = len(tasks) - _SHOWN
    return ", ".join(tasks[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
