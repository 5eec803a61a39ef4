"""What one run of a comparison leaves: a small file from which every number can be made again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mtl_lora_cli.compare.grid import TEST
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.metrics import Outcome
from mtl_lora_cli.metrics.declare import direction, find
from mtl_lora_cli.metrics.guessing import no_better
from mtl_lora_cli.metrics.outcome import OF_EACH_ROW
from mtl_lora_cli.runs.folder import read_json
from mtl_lora_cli.tasks.task import Task

PLAN = "plan.json"
RESULTS = "results"
DONE, FAILED = "done", "failed"


class Rows(Protocol):
    """What a task is scored on: rows of text, or pictures with maps."""

    @property
    def split(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...


def pack(
    task: Task,
    examples: Rows,
    outcome: Outcome,
    scores: Sequence[np.ndarray] | None = None,
) -> dict[str, Any]:
    """One task's answers: every metric, and of each example what metrics are made of.

    Args:
        task, examples: which.
        outcome: what was answered.
        scores: log-probabilities of each example's choices, where such were asked for.
    """
    guess = None if scores is None else no_better(outcome.gold, outcome.predicted, scores)
    entry: dict[str, Any] = {
        "split": examples.split,
        "examples": len(outcome.gold),
        "rows": f"{examples.fingerprint}-{len(outcome.gold)}",
        "metric": task.template.metrics[0],
        "title": task.template.title(task.template.metrics[0]),
        "metrics": {name: find(name).value(outcome) for name in task.template.metrics},
        "positive": outcome.positive,
        "guess": None if guess is None else asdict(guess),
    }
    values = {name: getattr(outcome, name) for name in OF_EACH_ROW}
    return entry | {name: _packed(own) for name, own in values.items() if own is not None}


def unpack(entry: Mapping[str, Any]) -> Outcome:
    """The inverse of `pack`; numbers to seven digits."""

    of_each = {name: _unpacked(name, entry[name]) for name in OF_EACH_ROW if name in entry}
    return Outcome(**of_each, positive=entry["positive"])


def _packed(values: np.ndarray) -> Any:
    """Numbers as one short text, those of many choices as one a row, texts as they are."""
    if values.dtype.kind == "U":
        return values.tolist()
    if values.ndim == 2:
        return [_packed(row) for row in values]
    return " ".join(f"{value:.7g}" for value in values.tolist())


def _unpacked(name: str, packed: Any) -> np.ndarray:
    if name in ("references", "answers"):
        return np.array(packed, dtype=np.str_)
    if isinstance(packed, list):
        return np.array([row.split() for row in packed], dtype=np.float64)
    return np.array(packed.split(), dtype=np.int64 if name in ("gold", "predicted") else np.float64)


def read_plan(folder: Path) -> dict[str, Any]:
    """The stored plan.

    Raises:
        MtlLoraError: there is none, or it is damaged.
    """
    return read_json(folder / PLAN)


def fixed_in(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What must not change while a comparison goes on; one without `score` is of the test rows."""
    return {"score": TEST, **plan["fixed"]}


def result_path(folder: Path, name: str) -> Path:
    """Where the result of a run lies."""
    return folder / RESULTS / f"{name}.json"


def read_result(folder: Path, name: str) -> dict[str, Any] | None:
    """The result of a run, None where there is none yet."""
    path = result_path(folder, name)
    return read_json(path) if path.is_file() else None


def is_done(result: Mapping[str, Any] | None) -> bool:
    """Whether the run trained to its end and was scored."""
    return result is not None and result["status"] == DONE


def average(entries: Mapping[str, Mapping[str, Any]]) -> float:
    """Mean over tasks, each by its own metric."""
    return float(np.mean([entry["metrics"][entry["metric"]] for entry in entries.values()]))


def points_in(plan: Mapping[str, Any], method: str) -> list[str]:
    """Labels of a method's settings, in the plan's order."""
    return list(dict.fromkeys(run["point"] for run in plan["runs"] if run["method"] == method))


def validation_scores(
    plan: Mapping[str, Any], results: Mapping[str, Mapping[str, Any] | None]
) -> dict[str, dict[str, float | None]]:
    """method → setting → mean validation score over seeds and tasks.

    None where a run of the setting failed or is still missing: half of the seeds would be another
    draw.
    """
    found: dict[str, dict[str, float | None]] = {}
    for method in plan["methods"]:
        found[method] = {}
        for label in points_in(plan, method):
            own = [
                results.get(run["id"])
                for run in plan["runs"]
                if (run["method"], run["point"]) == (method, label)
            ]
            whole = all(one is not None and one["status"] == DONE for one in own)
            scores = [average(one["validation"]) for one in own if one and whole]
            found[method][label] = float(np.mean(scores)) if scores else None
    return found


def choose(scores: Mapping[str, float | None], *, higher: bool = True) -> str | None:
    """The setting with the best score, of equal ones the first; None where none has a score."""
    known = {label: score for label, score in scores.items() if score is not None}
    return (max if higher else min)(known, key=lambda label: known[label]) if known else None


def chosen_points(
    plan: Mapping[str, Any], results: Mapping[str, Mapping[str, Any] | None]
) -> dict[str, str | None]:
    """method → the setting whose runs are reported."""
    if not plan["fixed"]["sweep"]:
        return {method: points_in(plan, method)[0] for method in plan["methods"]}
    scores = validation_scores(plan, results)
    higher = direction(_metrics_in(results)) == "higher"
    return {method: choose(own, higher=higher) for method, own in scores.items()}


def _metrics_in(results: Mapping[str, Mapping[str, Any] | None]) -> set[str]:
    """The metrics by which runs were scored on validation rows."""
    return {
        entry["metric"]
        for result in results.values()
        if is_done(result) and result is not None
        for entry in (result["validation"] or {}).values()
    }


def require_same_rows(name: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to pair answers to different examples.

    Raises:
        MtlLoraError: naming the task.
    """
    if len({(entry["rows"], entry["gold"]) for entry in entries}) > 1:
        raise MtlLoraError(
            f"task '{name}': its rows changed between the runs, so they cannot be paired; "
            f"start again with another --output"
        )
