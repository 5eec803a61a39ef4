"""A metric with its 95 % interval, from the examples alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from mtl_lora_cli.metrics.declare import Metric, find
from mtl_lora_cli.metrics.outcome import Array, Outcome

RESAMPLES = 1000
_AT_ONCE = 2_000_000  # weights that are held at once


@dataclass(frozen=True)
class Measured:
    """A metric with its 95 % interval; `value` is None where the metric is undefined, and `why`.

    There is no interval where all resamples agree, for they say nothing of the next rows then; unless
    one and the same answer to all rows comes to 0, as it would on the next ones.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    why: str | None = None


def measure(name: str, outcome: Outcome, seed: int = 0) -> Measured:
    """One metric with its 95 % interval: Wilson's for a share of right answers, else a percentile bootstrap.

    Raises:
        KeyError: an unknown metric.
    """
    metric = find(name)
    why = metric.undefined(outcome)
    if why:
        return Measured(None, why=why)
    value = metric.value(outcome)
    if metric.proportion:
        right = int((outcome.gold == outcome.predicted).sum())
        return Measured(value, *wilson(right, len(outcome.gold)))
    samples = bootstrap(metric, outcome, seed)
    size = len(outcome.gold)
    always_0 = value == 0 and size > 1 and len(np.unique(outcome.predicted)) == 1
    if not samples.size or (np.ptp(samples) == 0 and not always_0):
        return Measured(value)
    low, high = np.quantile(samples, [0.025, 0.975]).tolist()
    return Measured(value, low, high)


def bootstrap(metric: Metric, outcome: Outcome, seed: int = 0) -> Array:
    """The metric on `RESAMPLES` bootstrap samples, where it is defined, float64 [at most RESAMPLES].

    A sample is as many examples, drawn with repetition. Where labels alone matter, examples with the
    same gold and predicted label are one example with a weight: the same draw, and all samples are a few
    sums.
    """
    generator = np.random.default_rng(seed)
    if metric.reads:
        parts = _drawn(len(outcome.gold), generator)
        values = np.concatenate([metric.raw(outcome, weights) for weights in parts])
    else:
        pairs, how_often = _pairs(outcome)
        size = len(outcome.gold)
        weights = generator.multinomial(size, how_often / size, size=RESAMPLES)
        values = metric.raw(pairs, weights)
    return values[~np.isnan(values)]


def _drawn(examples: int, generator: np.random.Generator) -> Iterator[Array]:
    """Weights [≤ RESAMPLES, E] in parts that make up `RESAMPLES`."""
    most = max(1, _AT_ONCE // examples)
    for start in range(0, RESAMPLES, most):
        yield counted(generator, examples, min(most, RESAMPLES - start))


def counted(generator: np.random.Generator, examples: int, resamples: int) -> Array:
    """How often each example is drawn, where as many are drawn with replacement: int [R, E]."""
    places = generator.integers(examples, size=(resamples, examples))
    places += np.arange(resamples)[:, None] * examples
    return np.bincount(places.ravel(), minlength=resamples * examples).reshape(resamples, examples)


def _pairs(outcome: Outcome) -> tuple[Outcome, Array]:
    """The different pairs of a gold and a predicted label, and how many examples have each."""
    (gold, predicted), how_often = np.unique(
        np.stack([outcome.gold, outcome.predicted]), axis=1, return_counts=True
    )
    return Outcome(gold, predicted, positive=outcome.positive), how_often


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of the proportion p = right / total.

    (p + z² / 2n ± z √(p (1 − p) / n + z² / 4n²)) / (1 + z² / n), z = Φ⁻¹(0.975).
    Source: Wilson 1927, doi 10.1080/01621459.1927.10502953.
    """
    z, p = float(special.ndtri(0.975)), right / total
    centre = p + z * z / (2 * total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    low, high = ((centre + side * half) / (1 + z * z / total) for side in (-1, 1))
    return 0.0 if right == 0 else low, 1.0 if right == total else high


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided p-value that two predictors are right equally often on the same examples.

    Of n examples that one alone has right, k are one predictor's: p = min(1, 2 P(X ≤ min(k, n − k))) for
    X binomial with n and 1/2.

    Raises:
        ValueError: the two do not cover the same number of examples.
    """
    one, two = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if one.shape != two.shape:
        raise ValueError(f"{one.size} and {two.size} examples cannot be paired")
    only_one, only_two = int((one & ~two).sum()), int((two & ~one).sum())
    if only_one + only_two == 0:
        return 1.0
    fewer = min(only_one, only_two)
    return min(1.0, 2 * float(special.bdtr(fewer, only_one + only_two, 0.5)))
