"""What a metric is: a formula in weighted form, and what has to be known of it.

    @metric("matthews", of=LABELS, undefined=one_class, range=(-1, 1))
    def matthews(o: Outcome, w: Array) -> Array: ...

The formula takes an outcome of E examples and weights w [R, E], how often each example counts in each
of R resamples, and gives the metric of each resample [R], NaN where it is undefined. Weights of one
give the value, drawn ones its interval; so a metric is written once. All that names metrics (templates,
tables, results, pages) asks here. A file of the user's own declares more with the same decorator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np

from mtl_lora_cli.errors import MtlLoraError, UsageError, did_you_mean
from mtl_lora_cli.extensions import is_ours, origin, require_new
from mtl_lora_cli.metrics.outcome import OF_EACH_ROW, Array, Outcome
from mtl_lora_cli.metrics.tallies import tally_of

Formula = Callable[[Outcome, Array], Array]
Reason = Callable[[Outcome], "str | None"]


class Of(StrEnum):
    """Which tasks a metric means something for; the value says it to a person."""

    CHOICES = "tasks with choices"
    LABELS = "the same choices in every row"
    TWO = "two choices"
    VALUES = "scoring: expectation"
    FREE = "free answers"
    # Of maps: the objective's own name; parts are classes, too.
    SEGMENTATION = "segmentation"
    SALIENCY = "saliency"
    EDGES = "edges"
    DEPTH = "depth"
    NORMALS = "normals"


CHOICES, LABELS, TWO, VALUES, FREE, SEGMENTATION, SALIENCY, EDGES, DEPTH, NORMALS = Of
_OF_MAPS = (SEGMENTATION, SALIENCY, EDGES, DEPTH, NORMALS)
_LACKING = {
    "gold_value": "no numbers",
    "predicted_value": "no numbers",
    "positive_score": "generated answers have no scores",
    "probabilities": "generated answers have no scores",
    "references": "the texts of the answers were not kept",
    "answers": "the texts of the answers were not kept",
    "tallies": "no maps",
}


@dataclass(frozen=True)
class Metric:
    """A declared metric.

    Attributes:
        name: as templates and results name it.
        formula: outcome of E examples and weights [R, E] → float64 [R], NaN where it is undefined.
        of: the tasks that it means something for. With `TWO` it is about the positive class.
        reads: fields of `Outcome` that it needs beside `gold` and `predicted`.
        reason: why it is undefined on all examples as they are; None where it is not.
        better: which direction is.
        range: least and largest value; another one is an error of the formula.
        undefined_as: what it counts as where it is undefined and a number is needed all the same: as
            guessing, or worse.
        proportion: it is the share of right answers: its interval is Wilson's, and McNemar's test is
            about it.
        digits: behind the point, in tables.
    """

    name: str
    formula: Formula
    of: Of
    reads: tuple[str, ...] = ()
    reason: Reason = lambda outcome: None
    better: Literal["higher", "lower"] = "higher"
    range: tuple[float, float] = (0.0, 1.0)
    undefined_as: float = 0.0
    proportion: bool = False
    digits: int = 3

    @property
    def of_positive(self) -> bool:
        """Whether it says how well the positive class is told from the other."""
        return self.of is TWO

    @property
    def where(self) -> str:
        """Where it was declared, for messages."""
        return origin(self.formula)

    def known(self, outcome: Outcome) -> bool:
        """Whether the outcome has what it reads."""
        return all(getattr(outcome, name) is not None for name in self.reads)

    def undefined(self, outcome: Outcome) -> str | None:
        """Why it has no value on these answers; None where it has one."""
        if len(outcome.gold) == 0:
            return "no examples"
        lacking = [name for name in self.reads if getattr(outcome, name) is None]
        if lacking:
            return _LACKING[lacking[0]]
        why = self.reason(outcome)
        if why is None and math.isnan(self.raw(outcome, np.ones((1, len(outcome.gold))))[0]):
            return "it is 0 / 0 on these rows"
        return why

    def raw(self, outcome: Outcome, weights: Array) -> Array:
        """The metric of each resample, float64 [R] for weights [R, E]; NaN where it is undefined.

        Raises:
            UsageError: the formula fails, or gives what it must not; the line that declares it is named.
        """
        try:
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.asarray(self.formula(outcome, weights.astype(np.float64)), np.float64)
        except MtlLoraError:
            raise
        except Exception as error:  # a user's formula may fail in any way
            raise self._fault(f"fails: {type(error).__name__}: {error}") from error
        if values.shape != (len(weights),):
            shape = list(values.shape)
            raise self._fault(f"expected {len(weights)} numbers, one a resample, received {shape}")
        low, high = self.range
        known = values[~np.isnan(values)]
        if known.size and (known.min() < low - 1e-9 or known.max() > high + 1e-9):
            worst = known.min() if known.min() < low - 1e-9 else known.max()
            raise self._fault(f"gave {worst:g}, outside of its range {low:g} to {high:g}")
        return values

    def resampled(self, outcome: Outcome, weights: Array) -> Array:
        """`raw`, with `undefined_as` where it is undefined, or not known."""
        if not self.known(outcome):
            return np.full(len(weights), self.undefined_as)
        values = self.raw(outcome, weights)
        return np.where(np.isnan(values), self.undefined_as, values)

    def value(self, outcome: Outcome) -> float:
        """`resampled` of the examples as they are."""
        return float(self.resampled(outcome, np.ones((1, len(outcome.gold))))[0])

    def goodness(self, outcome: Outcome) -> Array:
        """How good each example's answer is [E]: 1 or 0 for right or wrong; −|error| of a number."""
        if self.of is VALUES:
            assert outcome.gold_value is not None
            assert outcome.predicted_value is not None
            return -np.abs(outcome.gold_value - outcome.predicted_value)
        return (outcome.gold == outcome.predicted).astype(np.float64)

    def _fault(self, what: str) -> UsageError:
        return UsageError(f"{self.where}: the metric '{self.name}' {what}")


METRICS: dict[str, Metric] = {}


def metric(
    name: str,
    *,
    of: Of,
    reads: Sequence[str] = (),
    undefined: Reason = lambda outcome: None,
    better: Literal["higher", "lower"] = "higher",
    range: tuple[float, float] = (0.0, 1.0),
    undefined_as: float | None = None,
    proportion: bool = False,
    digits: int = 3,
) -> Callable[[Formula], Formula]:
    """Declare a function as a metric; see `Metric`, whose attributes the arguments are.

    `undefined_as` is 0 where higher is better unless it is said, and else the range's end.

    Raises:
        UsageError: the name is taken; `reads` names no field of an outcome; there is nothing that an
            undefined value could count as. Of a user's function also: it fails on a few rows, or is not
            in weighted form there.
    """

    def declare(formula: Formula) -> Formula:
        require_new("metric", name, METRICS[name].formula if name in METRICS else None)
        for field in reads:
            if field not in _LACKING:
                near = did_you_mean(field, _LACKING) or f"; known: {', '.join(_LACKING)}"
                raise UsageError(f"the metric '{name}' reads '{field}', which is unknown{near}")
        if better not in ("higher", "lower"):
            raise UsageError(
                f"the metric '{name}': better is 'higher' or 'lower', received {better!r}"
            )
        worst = (
            undefined_as if undefined_as is not None else 0.0 if better == "higher" else range[1]
        )
        if not math.isfinite(worst):
            raise UsageError(f"the metric '{name}' needs undefined_as: its range has no end")
        declared = Metric(
            name, formula, of, tuple(reads), undefined, better, range, worst, proportion, digits
        )
        if not is_ours(formula):
            require_weighted(declared)
        METRICS[name] = declared
        return formula

    return declare


def find(name: str) -> Metric:
    """The metric of that name.

    Raises:
        KeyError: there is none.
    """
    return METRICS[name]


def fitting(kinds: Collection[Of]) -> list[str]:
    """Names of the metrics that mean something for a task of these kinds; the first is its default."""
    return [name for name, one in METRICS.items() if one.of in kinds]


def read_by(names: Iterable[str]) -> set[str]:
    """The fields of an outcome that some metrics read."""
    return {field for name in names if name in METRICS for field in METRICS[name].reads}


def direction(names: Iterable[str]) -> Literal["higher", "lower"]:
    """Which direction is better for all of them, so that they can be averaged.

    Raises:
        ValueError: for one it is this, for one that.
    """
    seen = {METRICS[name].better: name for name in names if name in METRICS}
    if len(seen) > 1:
        raise ValueError(
            f"higher is better for {seen['higher']} and lower for {seen['lower']}: "
            "their average says nothing"
        )
    return next(iter(seen), "higher")


def require_weighted(metric: Metric) -> None:
    """Refuse a formula that fails on a few rows, or for which a weight is no repetition.

    Raises:
        UsageError: it is so.
    """
    outcome = (
        _few_maps(metric.of) if metric.of in _OF_MAPS else _few_rows(2 if metric.of is TWO else 3)
    )
    weights = np.array(
        [[2, 1, 0, 1, 2, 1, 0, 1], [0, 3, 1, 0, 1, 2, 0, 1], [1, 0, 2, 2, 0, 0, 3, 0]]
    )
    for once, weighted in zip(weights, metric.raw(outcome, weights), strict=True):
        drawn = outcome.take(np.repeat(np.arange(8), once))
        repeated = metric.raw(drawn, np.ones((1, len(drawn.gold))))[0]
        if not np.isclose(weighted, repeated, rtol=1e-9, atol=1e-9, equal_nan=True):
            raise UsageError(
                f"the metric '{metric.name}' is not in weighted form: some rows with weights of 0, 2 and "
                f"3 give {weighted:g}, the same rows left out and repeated {repeated:g}"
            )


def _few_rows(classes: int) -> Outcome:
    """Eight rows that have everything."""
    gold = np.array([0, 1, 1, 0, 1, 0, 1, 0]) + (classes > 2) * np.array([2, 0, 0, 2, 0, 0, 0, 0])
    predicted = np.array([0, 1, 0, 0, 1, 1, 1, 0])
    likely = np.full((8, classes), 0.2 / (classes - 1))
    likely[np.arange(8), predicted] = 0.8
    return Outcome(
        gold,
        predicted,
        gold_value=np.array([1.0, 2.5, 3.0, 0.5, 4.0, 1.5, 2.0, 3.5]),
        predicted_value=np.array([1.5, 2.0, 3.5, 1.0, 3.0, 1.0, 2.5, 3.0]),
        positive_score=likely[:, 1] + np.linspace(0, 0.1, 8),
        probabilities=likely,
        references=np.array(["12", "a red cat", "Paris", "7", "no one", "42", "a dog", "yes"]),
        answers=np.array(["12", "the red cat", "Paris.", "8", "no one", "42.0", "", "yes"]),
    )


def _few_maps(of: Of) -> Outcome:
    """Tallies of eight small maps that are random, but the same ones always."""
    generator = np.random.default_rng(0)
    count = tally_of(str(of), 3)
    truths: Array = generator.random((8, 6, 6, 3) if of is NORMALS else (8, 6, 6)) + 0.1
    answers: Array = generator.random(truths.shape) + 0.1
    if of is SEGMENTATION:
        truths, answers = (one.astype(np.int64) for one in (truths * 2.5, answers * 2.5))
    tallies = np.stack([count(*pair) for pair in zip(truths, answers, strict=True)])
    return Outcome(np.zeros(8, np.int64), np.zeros(8, np.int64), tallies=tallies)


assert set(_LACKING) == {*OF_EACH_ROW} - {"gold", "predicted"}
