"""Means, intervals over seeds and examples, and paired differences between methods.

A score Y_{m,s,t} of method m with seed s on task t is a metric over the task's examples. The value
of a method on a task is its mean over seeds, its average the mean over tasks. Methods are paired:
the same seed draws the same data in the same order, and all are asked the same examples. So one
draw of seeds and of examples serves all methods, and what is common to them leaves a difference.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtl_lora_cli.metrics.declare import find
from mtl_lora_cli.metrics.intervals import mcnemar
from mtl_lora_cli.metrics.outcome import Outcome
from mtl_lora_cli.metrics.paired import bootstrap_p, example_weights

RESAMPLES = 2000


@dataclass(frozen=True)
class TaskRuns:
    """What all methods answered on one task.

    Attributes:
        metric: by which the task is scored.
        outcomes: method → an outcome for each seed, in the order of the seeds.
    """

    metric: str
    outcomes: Mapping[str, Sequence[Outcome]]


@dataclass(frozen=True)
class SeedMean:
    """A value with its 95 % interval.

    Attributes:
        value, low, high: the mean over seeds, and its interval.
        seeds: the value for each seed.
    """

    value: float
    low: float
    high: float
    seeds: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "seeds": list(self.seeds)}


@dataclass(frozen=True)
class SeedDifference(SeedMean):
    """A method less the baseline.

    Attributes:
        p: two-sided, by the bootstrap: over seeds and examples.
        p_holm: p after Holm's correction over the tasks (of an average: over the methods).
        p_sign: exact sign test over the examples of these very runs; None for an average.
    """

    p: float
    p_holm: float | None = None
    p_sign: float | None = None


@dataclass(frozen=True)
class Compared:
    """Everything that the report says of scores.

    Attributes:
        tasks: method → task → estimate.
        average: method → mean over tasks, or Δm.
        task_differences, average_differences: the same for all but the baseline, against it.
    """

    tasks: dict[str, dict[str, SeedMean]]
    average: dict[str, SeedMean]
    task_differences: dict[str, dict[str, SeedDifference]]
    average_differences: dict[str, SeedDifference]


def compare(
    tasks: Mapping[str, TaskRuns],
    baseline: str,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    apart: Collection[str] = (),
    gains_over: str | None = None,
) -> Compared:
    """Compare methods that ran with the same seeds on the same examples.

    Args:
        tasks: name → answers of all methods.
        baseline: the method that the others are compared with.
        resamples: B.
        seed: of the resampling.
        apart: methods whose average is no claim to be tested; Holm's correction leaves them out.
        gains_over: the method over which the average is one of relative gains, in percent: Δm, where a lower
            value of a metric whose better direction is lower is a gain. None: it is one of the scores.
    """
    first = next(iter(tasks.values()))
    methods = list(first.outcomes)
    count = len(first.outcomes[baseline])
    drawn = seed_shares(count, resamples, seed)
    points, samples = {}, {}
    for name, runs in tasks.items():
        points[name], samples[name] = _score(name, runs, drawn, seed)
    estimates = {
        method: {name: _estimate(points[name][place], samples[name][place]) for name in tasks}
        for place, method in enumerate(methods)
    }

    def mean(values: Mapping[str, np.ndarray]) -> np.ndarray:
        if gains_over is None:
            return np.asarray(np.mean([values[name] for name in tasks], axis=0))
        place = methods.index(gains_over)
        gains = [_gains(tasks[name].metric, values[name], place) for name in tasks]
        return np.asarray(np.mean(gains, axis=0))

    mean_points, mean_samples = mean(points), mean(samples)
    average = {
        method: _estimate(mean_points[place], mean_samples[place])
        for place, method in enumerate(methods)
    }
    base = methods.index(baseline)
    task_differences: dict[str, dict[str, SeedDifference]] = {}
    average_differences: dict[str, SeedDifference] = {}
    for place, method in enumerate(methods):
        if method == baseline:
            continue
        signs = {
            name: None if gains_over is not None else sign_test(runs, method, baseline)
            for name, runs in tasks.items()
        }
        found = {
            name: _difference(points[name], samples[name], place, base, signs[name])
            for name in tasks
        }
        task_differences[method] = _corrected(found)
        average_differences[method] = _difference(mean_points, mean_samples, place, base, None)
    claims = {m: one for m, one in average_differences.items() if m not in apart}
    average_differences.update(_corrected(claims))
    return Compared(estimates, average, task_differences, average_differences)


def seed_shares(seeds: int, resamples: int, seed: int) -> np.ndarray:
    """[B, S]: the share of each seed in each resample.

    S − 1 of S seeds are drawn, with replacement: the spread of their mean is then s² / S with the
    unbiased s², where S drawn ones would give (S − 1) / S of it, half for two seeds.
    """
    generator = np.random.default_rng([seed, 0])
    drawn = max(1, seeds - 1)
    return generator.multinomial(drawn, np.full(seeds, 1 / seeds), size=resamples) / drawn


def _score(
    task: str, runs: TaskRuns, shares: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The scores [M, S], and the mean over the drawn seeds on the drawn examples [M, B]."""
    outcomes = list(runs.outcomes.values())
    metric = find(runs.metric)
    points = np.asarray([[metric.value(one) for one in each] for each in outcomes])
    examples = len(outcomes[0][0].gold)
    samples = np.empty((len(outcomes), len(shares)))
    start = 0
    for weights in example_weights(examples, len(shares), task, seed):
        end = start + len(weights)
        for place, each in enumerate(outcomes):
            # One draw of examples for all seeds: they were asked the same ones.
            scores = _each_once(runs.metric, each, weights)
            samples[place, start:end] = (scores * shares[start:end]).sum(1)
        start = end
    return points, samples


def _each_once(name: str, outcomes: Sequence[Outcome], weights: np.ndarray) -> np.ndarray:
    """[B, S]; an outcome that stands for several seeds is scored once."""
    known: dict[int, np.ndarray] = {}
    for one in outcomes:
        if id(one) not in known:
            known[id(one)] = find(name).resampled(one, weights)
    return np.stack([known[id(one)] for one in outcomes], axis=1)


def _gains(metric: str, values: np.ndarray, place: int) -> np.ndarray:
    """Of scores [M, S] of all methods, what each gains over one of them, in percent of its score; NaN where that is 0."""
    sign = -1 if find(metric).better == "lower" else 1
    over = np.where(values[place] == 0, np.nan, values[place])
    return np.asarray(sign * 100 * (values - over) / over)


def _estimate(seeds: np.ndarray, samples: np.ndarray) -> SeedMean:
    low, high = np.nanquantile(samples, [0.025, 0.975]).tolist()
    return SeedMean(float(seeds.mean()), low, high, tuple(seeds.tolist()))


def _difference(
    points: np.ndarray, samples: np.ndarray, place: int, base: int, sign: float | None
) -> SeedDifference:
    found = samples[place] - samples[base]
    estimate = _estimate(points[place] - points[base], found)
    return SeedDifference(**vars(estimate), p=bootstrap_p(found), p_sign=sign)


def sign_test(runs: TaskRuns, method: str, baseline: str) -> float:
    """Exact sign test over examples: which of two methods, summed over seeds, answered it better.

    With one seed, and right or wrong answers, it is McNemar's test. It says nothing about other
    seeds.
    """
    metric = find(runs.metric)
    one, two = (
        np.sum([metric.goodness(outcome) for outcome in runs.outcomes[name]], axis=0)
        for name in (method, baseline)
    )
    return mcnemar((one - two > 1e-12).tolist(), (two - one > 1e-12).tolist())


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p'_(i) = max_{j ≤ i} min(1, (k − j + 1) p_(j)), j from 1."""
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for place, number in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[number]))
        corrected[number] = highest
    return corrected


def _corrected(found: Mapping[str, SeedDifference]) -> dict[str, SeedDifference]:
    values = holm([one.p for one in found.values()])
    return {
        name: SeedDifference(**{**vars(one), "p_holm": value})
        for (name, one), value in zip(found.items(), values, strict=True)
    }
