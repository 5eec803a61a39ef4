"""Metrics and their uncertainty, from scikit-learn and scipy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn import metrics as sk

RESAMPLES = 1000


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


@dataclass(frozen=True)
class Outcome:
    """What a task's metrics are computed from.

    Attributes:
        gold: [E] index of the right choice.
        predicted: [E] index of the chosen one.
        gold_value, predicted_value: [E] numbers, where the task is scored as an expectation.
        positive_score: [E] probability of the positive class among two choices, if there are two.
        positive: index of the positive class.
    """

    gold: np.ndarray
    predicted: np.ndarray
    gold_value: np.ndarray | None = None
    predicted_value: np.ndarray | None = None
    positive_score: np.ndarray | None = None
    positive: int = 1

    def tells(self, name: str) -> bool:
        """Whether what the metric is computed from is there, and so whether it is known at all."""
        if name in ("pearson", "spearman"):
            return self.gold_value is not None and self.predicted_value is not None
        return name in _METRICS and (name != "roc_auc" or self.positive_score is not None)

    def take(self, numbers: np.ndarray) -> Outcome:
        """Some of the examples, with repetition."""

        def part(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[numbers]

        return Outcome(
            self.gold[numbers],
            self.predicted[numbers],
            part(self.gold_value),
            part(self.predicted_value),
            part(self.positive_score),
            self.positive,
        )


def measure(name: str, outcome: Outcome, seed: int = 0) -> Measured:
    """One metric with its 95 % interval: Wilson's for accuracy, else a percentile bootstrap.

    Raises:
        KeyError: an unknown metric.
    """
    compute = _METRICS[name]
    why = undefined(name, outcome)
    if why:
        return Measured(None, why=why)
    value = compute(outcome)
    if name in ("accuracy", "exact_match"):
        right = int((outcome.gold == outcome.predicted).sum())
        low, high = wilson(right, len(outcome.gold))
        return Measured(value, low, high)
    samples = _samples(name, outcome, seed)
    size = len(outcome.gold)
    always_0 = value == 0 and size > 1 and len(np.unique(outcome.predicted)) == 1
    if not samples or (min(samples) == max(samples) and not always_0):
        return Measured(value)
    low, high = np.quantile(samples, [0.025, 0.975]).tolist()
    return Measured(value, low, high)


def _samples(name: str, outcome: Outcome, seed: int) -> list[float]:
    """The metric on bootstrap samples, as many examples drawn with repetition, where it is defined.

    Where labels alone matter, examples with the same gold and predicted label are one example with
    a weight: the same draw, and all samples are a few sums.
    """
    from mtl_lora_cli.evaluation.resampled import resampled

    generator = np.random.default_rng(seed)
    size = len(outcome.gold)
    if name in ("roc_auc", "pearson", "spearman"):
        parts = (outcome.take(generator.integers(size, size=size)) for _ in range(RESAMPLES))
        return [_METRICS[name](part) for part in parts if not undefined(name, part)]
    (gold, predicted), how_often = np.unique(
        np.stack([outcome.gold, outcome.predicted]), axis=1, return_counts=True
    )
    weights = generator.multinomial(size, how_often / size, size=RESAMPLES)
    pairs = Outcome(gold, predicted, positive=outcome.positive)
    values = resampled(name, pairs, weights)
    drawn = (pairs.take(np.flatnonzero(one)) for one in weights)
    return [
        float(value) for value, part in zip(values, drawn, strict=True) if not undefined(name, part)
    ]


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion."""
    interval = stats.binomtest(right, total).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided p-value that two predictors are right equally often on the same examples.

    Raises:
        ValueError: the two do not cover the same number of examples.
    """
    one, two = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if one.shape != two.shape:
        raise ValueError(f"{one.size} and {two.size} examples cannot be paired")
    only_one, only_two = int((one & ~two).sum()), int((two & ~one).sum())
    if only_one + only_two == 0:
        return 1.0
    return float(stats.binomtest(only_one, only_one + only_two).pvalue)


def undefined(name: str, o: Outcome) -> str | None:
    """Why a metric has no value on these answers; None where it has one."""
    if len(o.gold) == 0:
        return "no examples"
    if name in ("pearson", "spearman"):
        assert o.gold_value is not None and o.predicted_value is not None
        for what, values in (("gold", o.gold_value), ("predicted", o.predicted_value)):
            if len(values) < 2 or _alike(values):
                return f"all {what} values are equal"
    if name == "roc_auc" and o.positive_score is None:
        return "generated answers have no scores"
    if name == "roc_auc" and len(np.unique(o.gold)) < 2:
        return "only one class among the gold labels"
    if name == "f1" and not np.any((o.gold == o.positive) | (o.predicted == o.positive)):
        return "no row has the positive class, and none is given it"
    if name in ("matthews", "quadratic_kappa") and len(np.union1d(o.gold, o.predicted)) < 2:
        return "only one class among gold and predicted labels"
    return None


def _alike(values: np.ndarray) -> bool:
    """Equal but for rounding."""
    return float(np.ptp(values)) <= 1e-12 * max(1.0, float(np.abs(values).max()))


def _matthews(o: Outcome) -> float:
    return float(sk.matthews_corrcoef(o.gold, o.predicted))


def _kappa(o: Outcome) -> float:
    return float(sk.cohen_kappa_score(o.gold, o.predicted, weights="quadratic"))


def _f1(o: Outcome) -> float:
    return float(
        sk.f1_score(
            o.gold == o.positive,
            o.predicted == o.positive,
            zero_division=0.0,
        )
    )


def _macro_f1(o: Outcome) -> float:
    # -1, an answer that named no choice, is wrong for every class and no class itself.
    labels = [label for label in np.union1d(o.gold, o.predicted) if label >= 0]
    return float(
        sk.f1_score(
            o.gold,
            o.predicted,
            labels=labels,
            average="macro",
            zero_division=0.0,
        )
    )


def _roc_auc(o: Outcome) -> float:
    return float(sk.roc_auc_score(o.gold == o.positive, o.positive_score))


def _correlation(which: Callable) -> Callable[[Outcome], float]:
    return lambda o: float(which(o.gold_value, o.predicted_value).statistic)


def _accuracy(o: Outcome) -> float:
    return float((o.gold == o.predicted).mean())


_METRICS: dict[str, Callable[[Outcome], float]] = {
    "accuracy": _accuracy,
    "exact_match": _accuracy,
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "quadratic_kappa": _kappa,
    "f1": _f1,
    "roc_auc": _roc_auc,
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}
