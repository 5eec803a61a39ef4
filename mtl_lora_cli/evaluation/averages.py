"""Averages over tasks, as the papers form them, with their uncertainty.

- `glue`: the mean over GLUE's tasks, where a task with several metrics counts by their mean and MNLI
  by the mean of matched and mismatched. CoLA: Matthews; MRPC and QQP: F1 and accuracy; STS-B: Pearson
  and Spearman; the others: accuracy. Source: arXiv 1804.07461, section 3.
- `glue (one metric)`: the same tasks by one metric each, as papers on LoRA do. CoLA: Matthews; STS-B:
  Pearson; the others: accuracy, and MNLI on both sets. Source: arXiv 2106.09685, table 2.
- `commonsense`: the mean accuracy over eight tasks. Source: arXiv 2304.01933, table 3.
- `all tasks`: the mean of each task's first metric.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mtl_lora_cli.evaluation.results import outcome_in
from mtl_lora_cli.metrics.declare import METRICS, direction, find
from mtl_lora_cli.metrics.intervals import Measured, mcnemar, measure
from mtl_lora_cli.metrics.paired import bootstrap_p, percentiles, sampled

Part = tuple[str, str]  # a task as the benchmark knows it, and a metric
Measure = tuple[int, str]  # a task's place among the results, and a metric
ALL = "all tasks"
_ACCURATE = ("sst2", "qnli", "rte", "wnli")
_MNLI = (("mnli", "accuracy"), ("mnli_mismatched", "accuracy"))
_COMMONSENSE = (
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
)
# The mean over groups of the mean over their parts; a part that is missing leaves its group smaller.
_GROUPS: dict[str, Sequence[Sequence[Part]]] = {
    "glue": (
        (("cola", "matthews"),),
        (("mrpc", "f1"), ("mrpc", "accuracy")),
        (("qqp", "f1"), ("qqp", "accuracy")),
        (("stsb", "pearson"), ("stsb", "spearman")),
        _MNLI,
        *(((name, "accuracy"),) for name in _ACCURATE),
    ),
    "glue (one metric)": (
        (("cola", "matthews"),),
        (("stsb", "pearson"),),
        _MNLI,
        *(((name, "accuracy"),) for name in ("mrpc", "qqp", *_ACCURATE)),
    ),
    "commonsense": tuple(((name, "accuracy"),) for name in _COMMONSENSE),
}
_FAMILIES = {"glue": "glue", "glue (one metric)": "glue", "commonsense": "commonsense"}
_OTHER_NAMES = {"boolq_no_passage": "boolq"}


@dataclass(frozen=True)
class Average:
    """A mean over tasks.

    Attributes:
        name: of the rule.
        tasks, of: how many of the benchmark's tasks there are, and how many it has.
        value, low, high: with its 95 % interval, from those of the tasks; None where a metric is
            undefined, and `why`.
        other: the same of the model beside it.
        difference, difference_low, difference_high, p: less the other's, paired by example.
    """

    name: str
    tasks: int
    of: int
    value: float | None
    low: float | None = None
    high: float | None = None
    why: str | None = None
    other: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None


def averages(
    results: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]] | None = None
) -> list[Average]:
    """The averages that results of one evaluation make up; none of a single task.

    Args:
        results: of different tasks.
        others: another model's results of the same tasks on the same rows, in the same order.
    """
    found: list[Average] = []
    if any(result.get("protocol") == "maps" for result in results):
        return found  # metres and shares have no mean; see `delta.py`
    told: list[Any] = []
    for name, groups, of in _rules(results):
        several = len({part[0] for group in groups for part in group}) > 1
        if several and (name == ALL or groups not in told):  # two rules may come to the same
            found.append(_average(name, groups, of, results, others))
            told.append(groups)
    return found


def _rules(
    results: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, list[list[Measure]], int]]:
    """Each rule's name, its groups as places in `results` with a metric, and its whole number of groups."""
    for name, groups in _GROUPS.items():
        places: dict[str, int] = {}
        for number, result in enumerate(results):
            known = _known_as(result, _FAMILIES[name])
            if known is not None:
                places.setdefault(known, number)
        found = [
            [(places[task], metric) for task, metric in group if task in places] for group in groups
        ]
        yield name, [group for group in found if group], len(groups)
    yield ALL, [[(n, next(iter(r["metrics"])))] for n, r in enumerate(results)], len(results)


def _known_as(result: Mapping[str, Any], family: str) -> str | None:
    """What the benchmark calls the task, by its template, or by its own name in LLM-Adapters' form."""
    template = result["template"]
    if template is None:
        return None
    folder, _, stem = template["name"].rpartition("/")
    if folder != family:
        return None
    if stem == "llm_adapters":
        stem = result["task"].lower().replace("-", "_")
    return _OTHER_NAMES.get(stem, stem)


def _average(
    name: str,
    groups: list[list[Measure]],
    of: int,
    results: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]] | None,
) -> Average:
    parts = _weighted(groups)
    try:
        direction(metric for _, metric in parts)
    except ValueError as error:
        return Average(name, len(groups), of, None, why=str(error))
    for number, metric_name in parts:
        for one in [results[number], *([] if others is None else [others[number]])]:
            why = _unknown(metric_name, one)
            if why is not None:
                return Average(name, len(groups), of, None, why=f"{one['task']}: {why}")
    value = _mean(parts, results)
    low, high = _interval(value, parts, results)
    found = Average(name, len(groups), of, value, low, high)
    return found if others is None else _compared(found, value, parts, results, others)


def _weighted(groups: list[list[Measure]]) -> dict[Measure, float]:
    """What each metric of each task counts for: groups alike, and their parts alike."""
    return {part: 1 / len(groups) / len(group) for group in groups for part in group}


def _unknown(name: str, result: Mapping[str, Any]) -> str | None:
    """Why a metric has no value, if it has none."""
    own, outcome = result["metrics"].get(name), outcome_in(result)
    if own is not None and own["value"] is None:
        return f"{name} is undefined: {own['why']}"
    if name not in METRICS or not METRICS[name].known(outcome):
        return f"{name} is not known"
    why = METRICS[name].undefined(outcome) if own is None else None
    return None if why is None else f"{name} is undefined: {why}"


def _mean(parts: Mapping[Measure, float], results: Sequence[Mapping[str, Any]]) -> float:
    """Σ w_i · metric_i."""
    values = (w * find(name).value(outcome_in(results[n])) for (n, name), w in parts.items())
    return float(sum(values))


def _interval(
    value: float, parts: Mapping[Measure, float], results: Sequence[Mapping[str, Any]]
) -> tuple[float | None, float | None]:
    """From the intervals of the parts: θ − √Σ_t (Σ_i w_i (θ_i − l_i))², and θ + … of u_i − θ_i.

    Over tasks t, which are independent; metrics i of one task are not, and their distances are added.
    None where a part has no interval. Source: method of variance estimates recovery, Zou and Donner
    2008, doi 10.1002/sim.3095.
    """
    below: dict[int, float] = {}
    above: dict[int, float] = {}
    for (number, name), weight in parts.items():
        own = _measured(name, results[number])
        if own.value is None or own.low is None or own.high is None:
            return None, None
        below[number] = below.get(number, 0.0) + weight * (own.value - own.low)
        above[number] = above.get(number, 0.0) + weight * (own.high - own.value)
    return value - math.hypot(*below.values()), value + math.hypot(*above.values())


def _measured(name: str, result: Mapping[str, Any]) -> Measured:
    own = result["metrics"].get(name)
    if own is not None and own.get("low") is not None:
        return Measured(own["value"], own["low"], own["high"])
    return measure(name, outcome_in(result))


def _compared(
    found: Average,
    value: float,
    parts: Mapping[Measure, float],
    results: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
) -> Average:
    """The same beside another model's, on the same resamples.

    Where a task's resamples say nothing (`percentiles`), there is no interval, and p is McNemar's of
    the rows of all tasks together.
    """
    other = _mean(parts, others)
    apart: dict[int, np.ndarray] = {}
    for (number, name), weight in parts.items():
        task = results[number]["task"]
        ours, theirs = (sampled(name, outcome_in(some[number]), task) for some in (results, others))
        apart[number] = apart.get(number, 0.0) + weight * (ours - theirs)
    known = all(
        percentiles(own, len(results[number]["gold"]))[0] is not None
        for number, own in apart.items()
    )
    together = np.sum(list(apart.values()), axis=0)
    low, high = np.quantile(together, [0.025, 0.975]).tolist() if known else (None, None)
    return replace(
        found,
        other=other,
        difference=value - other,
        difference_low=low,
        difference_high=high,
        p=bootstrap_p(together)
        if known
        else mcnemar(*(_right(some, apart) for some in (results, others))),
    )


def _right(results: Sequence[Mapping[str, Any]], numbers: Iterable[int]) -> list[bool]:
    """Of every row of some results whether it was answered right."""
    outcomes = [outcome_in(results[number]) for number in numbers]
    return [bool(right) for one in outcomes for right in one.gold == one.predicted]
