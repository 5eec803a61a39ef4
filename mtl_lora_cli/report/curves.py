"""What changed from step to step, in few enough points to be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from mtl_lora_cli.report.events import Events, number

_POINTS, _FEWEST = 200, 20  # of a curve
_VALUES = 8000  # of all tasks' curves together: many tasks have shorter ones
_LOOKS = 100  # at held-out examples
_OF_STEPS = ("loss", "learning_rate", "tokens_per_second", "memory_gib", "floor_share")
_OF_TASKS = ("loss", "metric")


def training_curves(steps: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, Any]:
    """Means over groups of as many steps each, where there are more steps than points.

    Of the gradient norm it is the highest of each group: a mean would hide a spike.

    Returns:
        `steps_per_point`; `step`, the last one of each group; the curves by name; and `task_loss`,
        task → its curve. A value is None where no step of the group has one, and a curve is None
        where none has.
    """
    most = max(_FEWEST, min(_POINTS, _VALUES // max(1, len(tasks))))
    size = max(1, -(-len(steps) // most))
    groups = [steps[start : start + size] for start in range(0, len(steps), size)]

    def curve(*keys: str, of: Callable[[list[float]], float] = fmean) -> list[float | None] | None:
        points = [_of_known(of, [_at(step, keys) for step in group]) for group in groups]
        return points if any(point is not None for point in points) else None

    return {
        "steps_per_point": size,
        "step": [group[-1]["step"] for group in groups],
        **{name: curve(name) for name in _OF_STEPS},
        "gradient_norm": curve("gradient_norm", of=max),
        "task_loss": {task: curve("task_loss", task) for task in tasks},
    }


def _at(step: Mapping[str, Any], keys: Sequence[str]) -> Any:
    value: Any = step
    for key in keys:
        value = value.get(key)
    return value


def _of_known(of: Callable[[list[float]], float], values: Sequence[Any]) -> float | None:
    known = [value for value in map(number, values) if value is not None]
    return of(known) if known else None


def validation_looks(events: Events, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Each look at held-out examples: `step`, and of each task that has them `loss` and `metric`.

    `macro` holds the means over the tasks where the run logged them. Of more than a hundred looks
    some are left out evenly; the last one is there.
    """
    looks = events.validations
    size = max(1, -(-len(looks) // _LOOKS))
    kept = looks[::-1][::size][::-1]
    return [
        {
            "step": look["step"],
            **{kind: _by_task(look.get(kind), tasks) for kind in _OF_TASKS},
            "macro": _by_task(look.get("macro"), _OF_TASKS),
        }
        for look in kept
    ]


def metric_names(events: Events, tasks: Sequence[str]) -> dict[str, str]:
    """Task → what is measured on its held-out examples, where the run says so."""
    found: dict[str, str] = {}
    for look in events.validations:
        named = look.get("metric_name")
        if isinstance(named, dict):
            found |= {task: str(name) for task, name in named.items() if task in tasks}
    return found


def _by_task(values: Any, names: Sequence[str]) -> dict[str, float | None]:
    values = values if isinstance(values, dict) else {}
    return {name: number(values[name]) for name in names if name in values}


def drawn_examples(
    steps: Sequence[Mapping[str, Any]], tasks: Sequence[str]
) -> dict[str, int] | None:
    """Examples of each task that the steps learned from; None where a step does not tell."""
    drawn = dict.fromkeys(tasks, 0)
    for step in steps:
        if not isinstance(step.get("examples"), dict):
            return None
        for task, count in step["examples"].items():
            if task in drawn and number(count) is not None:
                drawn[task] += count
    return drawn if steps else None
