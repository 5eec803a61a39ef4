"""Δm: what a model of several tasks gains over models of one task each, with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtl_lora_cli.evaluation.results import outcome_in
from mtl_lora_cli.metrics.declare import find
from mtl_lora_cli.metrics.maps import delta_m
from mtl_lora_cli.metrics.paired import percentiles, sampled


@dataclass(frozen=True)
class DeltaM:
    """In percent of the references' values, the mean over tasks of each one's first metric.

    Attributes:
        value, low, high: with a 95 % interval over images, which are drawn anew for each task.
        tasks: task → its own part, in percent.
        metrics: task → the metric.
    """

    value: float
    low: float | None
    high: float | None
    tasks: Mapping[str, float]
    metrics: Mapping[str, str]


def delta_of(
    results: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]
) -> DeltaM | None:
    """Δm of results against those of other runs on the same images; None where a value is missing or 0.

    Args:
        results: of different tasks.
        references: of the same tasks in the same order.
    """
    parts: dict[str, float] = {}
    drawn, metrics = [], {}
    for ours, theirs in zip(results, references, strict=True):
        name, task = next(iter(ours["metrics"])), ours["task"]
        declared, own, other = find(name), outcome_in(ours), outcome_in(theirs)
        if declared.undefined(own) or declared.undefined(other) or not declared.value(other):
            return None
        lower = {task} if declared.better == "lower" else set()
        value, reference = declared.value(own), declared.value(other)
        parts[task], metrics[task] = delta_m({task: value}, {task: reference}, lower), name
        samples = [sampled(name, one, task) for one in (own, other)]
        sign = -1 if lower else 1
        drawn.append(100 * sign * (samples[0] - samples[1]) / samples[1])
    if not parts:
        return None
    whole = np.mean(drawn, axis=0)
    low, high = percentiles(whole, min(len(one["gold"]) for one in results))
    return DeltaM(float(np.mean(list(parts.values()))), low, high, parts, metrics)
