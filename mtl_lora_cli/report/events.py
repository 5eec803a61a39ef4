"""What a run's metrics.jsonl says: its steps, what was looked at beside them, and what they sum up to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from mtl_lora_cli.runs.folder import RunFolder


@dataclass(frozen=True)
class Events:
    """The events that can be used, in their order.

    Attributes:
        steps, validations, gradients, unreached: of each kind.
        best: the last look at held-out examples that was the best so far, or None.
        unreadable: lines that are no event, or one that lacks what its kind must have.
    """

    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    gradients: list[dict[str, Any]]
    best: dict[str, Any] | None
    unreadable: int
    unreached: list[dict[str, Any]] = field(default_factory=list)


def read_events(run: RunFolder) -> Events:
    """Read metrics.jsonl, whatever state it is in; a torn last line is none yet."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _USABLE}
    lines = run.metrics.read_bytes().count(b"\n") if run.metrics.is_file() else 0
    good = 0
    for event in run.events():
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            continue
        usable = _USABLE.get(event["event"])
        if usable is None:  # of a kind that is not reported
            good += 1
        elif _is_count(event.get("step")) and usable(event):
            good += 1
            found[event["event"]].append(event)
    return Events(
        steps=found["step"],
        validations=found["validation"],
        gradients=found["gradients"],
        unreached=found["unreached"],
        best=found["best"][-1] if found["best"] else None,
        unreadable=max(0, lines - good),
    )


def number(value: Any) -> float | None:
    """A finite number; None for everything else."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return value if known and math.isfinite(value) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_step(event: Mapping[str, Any]) -> bool:
    needed = [event.get(key) for key in ("loss", "tokens", "seconds")]
    numbers = all(number(value) is not None for value in (*needed, event.get("memory_gib", 0)))
    return numbers and isinstance(event.get("task_loss"), dict)


def _is_validation(event: Mapping[str, Any]) -> bool:
    return isinstance(event.get("loss"), dict)


def _is_gradients(event: Mapping[str, Any]) -> bool:
    tasks, cosine = event.get("tasks"), event.get("cosine")
    if not isinstance(tasks, list) or not isinstance(cosine, list) or len(cosine) != len(tasks):
        return False
    if not all(isinstance(row, list) and len(row) == len(tasks) for row in cosine):
        return False
    return all(value is None or number(value) is not None for row in cosine for value in row)


def _is_best(event: Mapping[str, Any]) -> bool:
    return isinstance(event.get("of"), str) and number(event.get("value")) is not None


def _is_unreached(event: Mapping[str, Any]) -> bool:
    modules = event.get("modules")
    return isinstance(modules, list) and all(isinstance(one, str) for one in modules)


_USABLE = {
    "step": _is_step,
    "validation": _is_validation,
    "gradients": _is_gradients,
    "best": _is_best,
    "unreached": _is_unreached,
}


def training_facts(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What metrics.jsonl sums up to: steps, tokens, seconds, speed, memory, last loss, diagnoses.

    The speed is the median step's, where there are more than three without the first, which warms
    up; the last loss is the mean over the last tenth of the steps.
    """
    every = list(events)
    steps = [event for event in every if event["event"] == "step"]
    timed = steps[1:] if len(steps) > 3 else steps
    memory = [event["memory_gib"] for event in steps if "memory_gib" in event]
    last = steps[-max(1, len(steps) // 10) :]
    return {
        "steps": len(steps),
        "tokens": sum(event["tokens"] for event in steps),
        "seconds": sum(event["seconds"] for event in steps),
        "tokens_per_second": median(
            event["tokens"] / max(1e-9, event["seconds"]) for event in timed
        ),
        "peak_memory_gib": max(memory) if memory else None,
        "last_loss": sum(event["loss"] for event in last) / len(last),
        "gradients": mean_cosine([event for event in every if event["event"] == "gradients"]),
        "validation_loss": [
            {"step": event["step"], "loss": event["loss"]}
            for event in every
            if event["event"] == "validation"
        ],
    }


def mean_cosine(events: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The cosine of each pair of tasks, mean over the steps that held both; None without events.

    Returns:
        `tasks`, `cosine` [T, T] with None for a pair that never met, and `steps` that were looked at.
    """
    if not events:
        return None
    tasks = list(dict.fromkeys(name for event in events for name in event["tasks"]))
    found: dict[tuple[str, str], list[float]] = {}
    for event in events:
        for one, row in zip(event["tasks"], event["cosine"], strict=True):
            for two, value in zip(event["tasks"], row, strict=True):
                if value is not None:
                    found.setdefault((one, two), []).append(value)
    cosine = [
        [round(fmean(found[one, two]), 6) if (one, two) in found else None for two in tasks]
        for one in tasks
    ]
    return {"tasks": tasks, "cosine": cosine, "steps": len(events)}
