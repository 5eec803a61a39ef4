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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from mtl_lora_cli.evaluation.metrics import Outcome
from mtl_lora_cli.evaluation.paired import bootstrap_p, sampled
from mtl_lora_cli.evaluation.resampled import metric
from mtl_lora_cli.evaluation.results import outcome_in

Part = tuple[str, str]  # a task as the benchmark knows it, and a metric
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
        value, low, high: with its 95 % interval over the tasks' examples (a bootstrap within each
            task); None where a metric is undefined, and `why`.
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
    found, told = [], []
    for name, groups, of in _rules(results):
        several = len({part[0] for group in groups for part in group}) > 1
        if several and (name == ALL or groups not in told):  # two rules may come to the same
            found.append(_average(name, groups, of, results, others))
            told.append(groups)
    return found


def _rules(
    results: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, list[list[tuple[int, str]]], int]]:
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
    groups: list[list[tuple[int, str]]],
    of: int,
    results: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]] | None,
) -> Average:
    for number, metric_name in (part for group in groups for part in group):
        for one in [results[number], *([] if others is None else [others[number]])]:
            why = _unknown(metric_name, one)
            if why is not None:
                return Average(name, len(groups), of, None, why=f"{one['task']}: {why}")
    value, samples = _mean(groups, results)
    low, high = np.quantile(samples, [0.025, 0.975]).tolist()
    found = Average(name, len(groups), of, value, low, high)
    if others is None:
        return found
    other, their = _mean(groups, others)
    apart = samples - their
    difference_low, difference_high = np.quantile(apart, [0.025, 0.975]).tolist()
    return replace(
        found,
        other=other,
        difference=value - other,
        difference_low=difference_low,
        difference_high=difference_high,
        p=bootstrap_p(apart),
    )


def _unknown(name: str, result: Mapping[str, Any]) -> str | None:
    """Why a metric has no value, if it has none."""
    own = result["metrics"].get(name)
    if own is not None and own["value"] is None:
        return f"{name} is undefined: {own['why']}"
    return None if outcome_in(result).tells(name) else f"{name} is not known"


def _mean(
    groups: list[list[tuple[int, str]]], results: Sequence[Mapping[str, Any]]
) -> tuple[float, np.ndarray]:
    """The mean over groups of the mean over their parts, and the same on every resample [B]."""

    @cache
    def outcome(number: int) -> Outcome:
        return outcome_in(results[number])

    points, samples = [], []
    for group in groups:
        points.append(np.mean([metric(name, outcome(number)) for number, name in group]))
        drawn = [sampled(name, outcome(n), results[n]["task"]) for n, name in group]
        samples.append(np.mean(drawn, axis=0))
    return float(np.mean(points)), np.mean(samples, axis=0)
