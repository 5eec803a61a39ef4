"""The newest result of every task and way of asking, beside the base model's on the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.evaluation.averages import averages
from mtl_lora_cli.evaluation.protocols import LM_EVAL
from mtl_lora_cli.evaluation.results import compare_with_base, stored, theirs_in, title_in
from mtl_lora_cli.metrics.paired import right_or_wrong
from mtl_lora_cli.runs.folder import RunFolder

# What a table shows of how a task was asked: of two results that are alike in it, the newer counts.
_ASKED = ("task", "split", "protocol", "normalisation", "harness_task", "limit", "source")
_COUNTS = (
    "examples",
    "majority",
    "chance",
    "truncated_prompts",
    "unparsable",
    "unreadable",
    "ends_counted",
    "ties",
)
_KEPT = ("id", "task", "source", "split", "protocol", "normalisation", "limit", *_COUNTS)
Result = dict[str, Any]


def newest_results(run: RunFolder, tasks: Sequence[str]) -> list[Result]:
    """Stored results in the tasks' order: the adapter's, and the base model's where it has none.

    Raises:
        MtlLoraError: a file of a result is damaged.
    """
    newest: dict[str, Result] = {}
    for model in ("base", "adapter"):
        for result in stored(run):
            if result.get("model") == model:
                newest[repr([result.get(key) for key in _ASKED])] = result
    order = {name: number for number, name in enumerate(tasks)}
    return sorted(newest.values(), key=lambda r: (order.get(r["task"], len(order)), r["id"]))


@dataclass(frozen=True)
class RunScores:
    """What a run's evaluations say.

    Attributes:
        results: as stored, see `newest_results`.
        table: of each result what was asked, and its `metrics`: `value`, `low` and `high`, and `why`
            where it is undefined; `base`, `base_low` and `base_high`; `difference` with
            `difference_low` and `difference_high`, and `p`, the paired test.
        averages: the same of each average, as `name` over `tasks` of `of` tasks, with `limit`.
        damaged: why there are none, where that is no choice of the user's.
    """

    results: list[Result] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)
    averages: list[dict[str, Any]] = field(default_factory=list)
    damaged: str | None = None


def read_scores(run: RunFolder, tasks: Sequence[str]) -> RunScores:
    """Read them, whatever state they are in."""
    try:
        results = newest_results(run, tasks)
        return RunScores(results, *_scored(run, results))
    except (MtlLoraError, KeyError, TypeError, ValueError) as error:
        what = str(error) if isinstance(error, MtlLoraError) else f"{type(error).__name__} {error}"
        return RunScores(damaged=f"results cannot be read: {what}")


def _scored(
    run: RunFolder, results: Sequence[Result]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`Scores.table` and `Scores.averages`."""
    asked = [one for one in results if one["model"] != "base"]
    beside = {one["id"]: compare_with_base(run, one) for one in asked}
    found = []
    for result in results:
        other = beside.get(result["id"]) or result.get(
            "constant"
        )  # of maps one answer for all pixels
        ours, theirs = result["metrics"], other["metrics"] if other else {}
        if result["model"] == "base":
            ours, theirs = {name: {} for name in ours}, ours
        metrics = [
            {
                "name": name,
                "title": title_in(result, name),
                **_values(own),
                **_base_values(theirs.get(name)),
                **_paired(name, other),
            }
            for name, own in ours.items()
        ]
        found.append({**{key: result.get(key) for key in _KEPT}, "metrics": metrics})
    return found, list(_averages(asked, beside))


def _averages(
    results: Sequence[Result], beside: Mapping[str, Result | None]
) -> Iterator[dict[str, Any]]:
    """Over tasks that were asked with one limit by our own protocols; of each the newest result."""
    groups: dict[int | None, dict[str, Result]] = {}
    for result in sorted(results, key=lambda result: result["id"]):
        if result["protocol"] != LM_EVAL and not result.get("source"):
            groups.setdefault(result["limit"], {})[result["task"]] = result
    for limit, own in groups.items():
        others = [beside[result["id"]] for result in own.values()]
        theirs = [
            theirs_in(result, other)
            for result, other in zip(own.values(), others, strict=True)
            if other is not None
        ]
        known = theirs if len(theirs) == len(own) else None
        for average in averages(list(own.values()), known):
            yield {"limit": limit, **asdict(average)}


def _values(measured: Mapping[str, Any]) -> dict[str, Any]:
    return {key: measured.get(key) for key in ("value", "low", "high", "why")}


def _base_values(measured: Mapping[str, Any] | None) -> dict[str, Any]:
    own = measured or {}
    return {"base": own.get("value"), "base_low": own.get("low"), "base_high": own.get("high")}


def _paired(name: str, other: Mapping[str, Any] | None) -> dict[str, Any]:
    pair = ((other or {}).get("paired") or {}).get(name) or {}
    p = pair.get("p")
    if p is None and other is not None and right_or_wrong(name):
        p = other.get("p_value")
    return {
        "difference": pair.get("difference"),
        "difference_low": pair.get("low"),
        "difference_high": pair.get("high"),
        "p": p,
    }
