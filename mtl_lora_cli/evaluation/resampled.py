"""Metrics over many resamples of the same examples at once, as matrix products.

A resample is a vector of weights, how often each example was drawn. With weights of one the results
are those of `evaluation.metrics`, which a test asserts. Where a metric is undefined it counts here
as what guessing gives: 0.5 for `roc_auc`, 0 for every other one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mtl_lora_cli.evaluation.metrics import Outcome

BY_VALUE = ("pearson", "spearman")  # scored by the distance of numbers, not by right and wrong


def resampled(name: str, outcome: Outcome, weights: np.ndarray) -> np.ndarray:
    """One metric on every resample.

    Args:
        name: of the metric.
        outcome: of E examples.
        weights: [B, E], how often each example counts.

    Returns:
        float64 [B].

    Raises:
        KeyError: an unknown metric.
    """
    return _METRICS[name](outcome, weights.astype(np.float64))


def metric(name: str, outcome: Outcome) -> float:
    """The metric on the examples as they are."""
    return float(resampled(name, outcome, np.ones((1, len(outcome.gold))))[0])


def goodness(name: str, outcome: Outcome) -> np.ndarray:
    """How good each example's answer is [E]: 1 or 0 for right or wrong; −|error| where the metric
    is a correlation of numbers."""
    if name in BY_VALUE:
        assert outcome.gold_value is not None and outcome.predicted_value is not None
        return -np.abs(outcome.gold_value - outcome.predicted_value)
    return (outcome.gold == outcome.predicted).astype(np.float64)


def _accuracy(o: Outcome, w: np.ndarray) -> np.ndarray:
    return _ratio(w @ (o.gold == o.predicted).astype(np.float64), w.sum(1))


def _confusion(o: Outcome, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels [K] that occur, and counts [B, gold K, predicted K]."""
    labels = np.union1d(o.gold, o.predicted)
    size = len(labels)
    cell = np.searchsorted(labels, o.gold) * size + np.searchsorted(labels, o.predicted)
    member = np.zeros((len(cell), size * size))
    member[np.arange(len(cell)), cell] = 1
    return labels, (w @ member).reshape(-1, size, size)


def _f1(o: Outcome, w: np.ndarray) -> np.ndarray:
    gold, predicted = o.gold == o.positive, o.predicted == o.positive
    hits = w @ (gold & predicted).astype(np.float64)
    return _ratio(2 * hits, w @ gold.astype(np.float64) + w @ predicted.astype(np.float64))


def _macro_f1(o: Outcome, w: np.ndarray) -> np.ndarray:
    # -1, an answer that named no choice, is wrong for every class and no class itself.
    labels, counts = _confusion(o, w)
    named = labels >= 0
    both = (counts.sum(1) + counts.sum(2))[:, named]
    each = _ratio(2 * np.diagonal(counts, axis1=1, axis2=2)[:, named], both)
    return _ratio(each.sum(1), (both > 0).sum(1).astype(np.float64))


def _matthews(o: Outcome, w: np.ndarray) -> np.ndarray:
    _, counts = _confusion(o, w)
    gold, predicted, total = counts.sum(2), counts.sum(1), counts.sum((1, 2))
    covariance = np.trace(counts, axis1=1, axis2=2) * total - (gold * predicted).sum(1)
    spread = (total**2 - (gold**2).sum(1)) * (total**2 - (predicted**2).sum(1))
    return _ratio(covariance, np.sqrt(spread))


def _kappa(o: Outcome, w: np.ndarray) -> np.ndarray:
    _, counts = _confusion(o, w)
    size = counts.shape[1]
    distance = (np.arange(size)[:, None] - np.arange(size)) ** 2
    expected = counts.sum(2)[:, :, None] * counts.sum(1)[:, None, :]
    chance = _ratio((expected * distance).sum((1, 2)), counts.sum((1, 2)))
    found = (counts * distance).sum((1, 2))
    return np.where(chance > 0, 1 - _ratio(found, chance), 0.0)


def _roc_auc(o: Outcome, w: np.ndarray) -> np.ndarray:
    if o.positive_score is None:
        return np.full(len(w), 0.5)
    groups, member = _groups(o.positive_score)
    positive = _sums(w * (o.gold == o.positive), member, groups)
    negative = _sums(w * (o.gold != o.positive), member, groups)
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    return np.where(pairs > 0, _ratio((positive * below).sum(1), pairs), 0.5)


def _pearson(o: Outcome, w: np.ndarray) -> np.ndarray:
    assert o.gold_value is not None and o.predicted_value is not None
    one, two = (np.broadcast_to(v, w.shape) for v in (o.gold_value, o.predicted_value))
    return _correlation(one, two, w)


def _spearman(o: Outcome, w: np.ndarray) -> np.ndarray:
    assert o.gold_value is not None and o.predicted_value is not None
    return _correlation(_ranks(o.gold_value, w), _ranks(o.predicted_value, w), w)


def _ranks(values: np.ndarray, w: np.ndarray) -> np.ndarray:
    """[B, E]: the rank of each example's value in each resample; equal values share the mean."""
    groups, member = _groups(values)
    weight = _sums(w, member, groups)
    return (np.cumsum(weight, axis=1) - (weight - 1) / 2)[:, member]


def _correlation(one: np.ndarray, two: np.ndarray, w: np.ndarray) -> np.ndarray:
    total = w.sum(1, keepdims=True)
    one = one - _ratio((w * one).sum(1, keepdims=True), total)
    two = two - _ratio((w * two).sum(1, keepdims=True), total)
    squares = (w * one**2).sum(1) * (w * two**2).sum(1)
    # Of equal values only rounding is left.
    return np.where(squares > 1e-18, _ratio((w * one * two).sum(1), np.sqrt(squares)), 0.0)


def _groups(values: np.ndarray) -> tuple[int, np.ndarray]:
    """How many different values there are, and which of them, in rising order, each one is [E]."""
    different, member = np.unique(values, return_inverse=True)
    return len(different), member


def _sums(w: np.ndarray, member: np.ndarray, groups: int) -> np.ndarray:
    """[B, groups]: the weight of each group."""
    order = np.argsort(member, kind="stable")
    starts = np.searchsorted(member[order], np.arange(groups))
    return np.add.reduceat(w[:, order], starts, axis=1)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, 0 where that is 0 / 0."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below > 0)


_METRICS: dict[str, Callable[[Outcome, np.ndarray], np.ndarray]] = {
    "accuracy": _accuracy,
    "exact_match": _accuracy,
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "quadratic_kappa": _kappa,
    "f1": _f1,
    "roc_auc": _roc_auc,
    "pearson": _pearson,
    "spearman": _spearman,
}
