"""Signs, in a run's own log, that a task was not learned: what a person would have to look for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from mtl_lora_cli.models.unread import named

PARTED = 1.1  # times its lowest value: a held-out loss that has risen

Look = Mapping[str, Any]


def signs(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each sign, from what metrics.jsonl says of the looks at held-out examples.

    One answer for nearly all rows at the last look; answers that were at no look better than a guess by
    the shares of the right ones (`metrics.guessing`); a held-out loss that rose by a tenth from its lowest
    value while the training loss fell. And what got no gradient.
    """
    every = list(events)
    looks = [event for event in every if event.get("event") == "validation"]
    steps = [event for event in every if event.get("event") == "step"]
    found: list[str] = []
    for task in looks[-1]["loss"] if looks else ():
        found += _one_sided(task, looks[-1])
        found += _guessing(task, looks)
        found += _parted(task, looks, steps)
    unreached = [event for event in every if event.get("event") == "unreached"]
    silent = unreached and unreached[-1]["modules"]
    return [*found, unreached_line(unreached[-1])] if silent else found


def unreached_line(event: Mapping[str, Any]) -> str:
    """What of a run got no gradient, in words."""
    modules = list(event["modules"])
    some = "1 module" if len(modules) == 1 else f"{len(modules)} modules"
    return f"{some} got no gradient in {event['step']} steps and learned nothing: {named(modules)}"


def undrawn(steps: Iterable[Mapping[str, Any]], tasks: Sequence[str]) -> list[str]:
    """A line where no step of a finished run had a row of some task."""
    every = [one["examples"] for one in steps if isinstance(one.get("examples"), dict)]
    never = [task for task in tasks if not any(task in examples for examples in every)]
    if not every or not never:
        return []
    return [f"no step had a row of {named(never)}: what is theirs alone learned nothing"]


def _one_sided(task: str, look: Look) -> Iterator[str]:
    one = (look.get("one_answer") or {}).get(task)
    if one:
        yield (
            f"{task}: '{one['choice']}' is the answer to {100 * one['share']:.0f} % of the held-out "
            f"rows, and right of {100 * one['right']:.0f} %"
        )


def _guessing(task: str, looks: Sequence[Look]) -> Iterator[str]:
    guesses = [look["guess"][task] for look in looks if task in (look.get("guess") or {})]
    if guesses and not any(one["better"] for one in guesses):
        best = min(one["loss"] for one in guesses)
        yield (
            f"{task}: at none of {len(guesses)} looks were its answers better than a guess by how often "
            f"each is right ({best:.3f} nats a row at best, the guess {guesses[-1]['guess']:.3f}): it "
            "was not learned; more steps or a higher learning rate may do it"
        )


def _parted(task: str, looks: Sequence[Look], steps: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    losses = [(look["step"], look["loss"].get(task)) for look in looks]
    known = [(step, loss) for step, loss in losses if loss is not None]
    if not known:
        return
    (low_step, low), (last_step, last) = min(known, key=lambda one: one[1]), known[-1]
    before, after = (_trained(task, steps, until) for until in (low_step, last_step))
    if last > PARTED * low and before is not None and after is not None and after < before:
        yield (
            f"{task}: its held-out loss was lowest after step {low_step} ({low:.3f}) and is {last:.3f} "
            f"after step {last_step}, while its training loss fell from {before:.3f} to {after:.3f}: "
            "training.validation.best keeps the adapter of the best look"
        )


def _trained(task: str, steps: Sequence[Mapping[str, Any]], until: int) -> float | None:
    """A task's training loss before a step: the mean of the last ten steps that have it."""
    own = [
        step["task_loss"][task]
        for step in steps
        if step["step"] <= until and step.get("task_loss", {}).get(task) is not None
    ]
    return fmean(own[-10:]) if own else None
