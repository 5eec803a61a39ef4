"""The built-in metrics, each once: w [R, E] → [R]. Their names are papers' and libraries' own."""

from __future__ import annotations

import numpy as np

from mtl_lora_cli.metrics.declare import CHOICES, FREE, LABELS, TWO, VALUES, metric
from mtl_lora_cli.metrics.outcome import Array, Outcome


def _one_class(o: Outcome) -> str | None:
    one = len(np.union1d(o.gold, o.predicted)) < 2
    return "only one class among gold and predicted labels" if one else None


def _no_positive(o: Outcome) -> str | None:
    some = np.any((o.gold == o.positive) | (o.predicted == o.positive))
    return None if some else "no row has the positive class, and none is given it"


def _one_gold_class(o: Outcome) -> str | None:
    return "only one class among the gold labels" if len(np.unique(o.gold)) < 2 else None


def _values_alike(o: Outcome) -> str | None:
    for what, values in zip(("gold", "predicted"), _values(o), strict=True):
        if _alike(values, np.ones((1, len(values))))[0]:
            return f"all {what} values are equal"
    return None


@metric("accuracy", of=CHOICES, proportion=True)
def accuracy(o: Outcome, w: Array) -> Array:
    """Σ_i w_i [predicted_i = gold_i] / Σ_i w_i."""
    return _ratio(w @ (o.gold == o.predicted).astype(np.float64), w.sum(1))


metric("exact_match", of=FREE, proportion=True)(accuracy)


@metric("macro_f1", of=LABELS)
def macro_f1(o: Outcome, w: Array) -> Array:
    """The mean of 2 TP / (2 TP + FP + FN) over the classes that occur."""
    # -1, an answer that named no choice, is wrong for every class and no class itself.
    labels, counts = _confusion(o, w)
    named = labels >= 0
    both = (counts.sum(1) + counts.sum(2))[:, named]
    each = _ratio(2 * np.diagonal(counts, axis1=1, axis2=2)[:, named], both)
    return _ratio(each.sum(1), (both > 0).sum(1).astype(np.float64))


@metric("matthews", of=LABELS, undefined=_one_class, range=(-1, 1))
def matthews(o: Outcome, w: Array) -> Array:
    """R_K of K classes; 0 where all answers are alike, as scikit-learn and GLUE have it.

    Source: Gorodkin 2004, doi 10.1016/j.compbiolchem.2004.09.006.
    """
    _, counts = _confusion(o, w)
    gold, predicted, total = counts.sum(2), counts.sum(1), counts.sum((1, 2))
    covariance = np.trace(counts, axis1=1, axis2=2) * total - (gold * predicted).sum(1)
    spread = (total**2 - (gold**2).sum(1)) * (total**2 - (predicted**2).sum(1))
    classes = (gold + predicted > 0).sum(1)
    return np.where(classes > 1, _ratio(covariance, np.sqrt(spread)), np.nan)


@metric("quadratic_kappa", of=LABELS, undefined=_one_class, range=(-1, 1))
def quadratic_kappa(o: Outcome, w: Array) -> Array:
    """1 − Σ_jk d_jk observed_jk / Σ_jk d_jk expected_jk with d_jk = (j − k)².

    j and k are places among the classes that occur in the examples. In a resample that lacks a class in
    the middle they stay what they were, where scikit-learn, shown these rows alone, would count places
    anew and move the others nearer: so intervals differ from a bootstrap around scikit-learn's function
    where a class is rare. Values are the same. Source: Cohen 1968, doi 10.1037/h0026256.
    """
    _, counts = _confusion(o, w)
    size = counts.shape[1]
    distance = (np.arange(size)[:, None] - np.arange(size)) ** 2
    expected = counts.sum(2)[:, :, None] * counts.sum(1)[:, None, :]
    chance = _ratio((expected * distance).sum((1, 2)), counts.sum((1, 2)))
    observed = (counts * distance).sum((1, 2))
    return np.where(chance > 0, 1 - _ratio(observed, chance), np.nan)


@metric("f1", of=TWO, undefined=_no_positive)
def f1(o: Outcome, w: Array) -> Array:
    """2 TP / (2 TP + FP + FN) of the positive class."""
    gold, predicted = o.gold == o.positive, o.predicted == o.positive
    hits = w @ (gold & predicted).astype(np.float64)
    both = w @ gold.astype(np.float64) + w @ predicted.astype(np.float64)
    return np.where(both > 0, _ratio(2 * hits, both), np.nan)


@metric("roc_auc", of=TWO, reads=("positive_score",), undefined=_one_gold_class, undefined_as=0.5)
def roc_auc(o: Outcome, w: Array) -> Array:
    """The share of pairs of a positive and a negative row in which the positive one's score is higher.

    Equal scores count half.
    """
    assert o.positive_score is not None
    groups, member = _groups(o.positive_score)
    positive = _sums(w * (o.gold == o.positive), member, groups)
    negative = _sums(w * (o.gold != o.positive), member, groups)
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    return np.where(pairs > 0, _ratio((positive * below).sum(1), pairs), np.nan)


_OF_VALUES = ("gold_value", "predicted_value")


@metric("pearson", of=VALUES, reads=_OF_VALUES, undefined=_values_alike, range=(-1, 1))
def pearson(o: Outcome, w: Array) -> Array:
    """The correlation of the right and the predicted values."""
    gold, predicted = _values(o)
    correlation = _correlation(
        np.broadcast_to(gold, w.shape), np.broadcast_to(predicted, w.shape), w
    )
    return np.where(_alike(gold, w) | _alike(predicted, w), np.nan, correlation)


@metric("spearman", of=VALUES, reads=_OF_VALUES, undefined=_values_alike, range=(-1, 1))
def spearman(o: Outcome, w: Array) -> Array:
    """The correlation of their ranks; equal values share the mean rank."""
    gold, predicted = _values(o)
    correlation = _correlation(_ranks(gold, w), _ranks(predicted, w), w)
    return np.where(_alike(gold, w) | _alike(predicted, w), np.nan, correlation)


def _confusion(o: Outcome, w: Array) -> tuple[Array, Array]:
    """Labels [K] that occur, and counts [R, gold K, predicted K]."""
    labels = np.union1d(o.gold, o.predicted)
    size = len(labels)
    cell = np.searchsorted(labels, o.gold) * size + np.searchsorted(labels, o.predicted)
    cells, member = np.unique(cell, return_inverse=True)
    counts = np.zeros((len(w), size * size))
    counts[:, cells] = _sums(w, member, len(cells))
    return labels, counts.reshape(-1, size, size)


def _values(o: Outcome) -> tuple[Array, Array]:
    assert o.gold_value is not None
    assert o.predicted_value is not None
    return o.gold_value, o.predicted_value


def _alike(values: Array, w: Array) -> Array:
    """Of each resample whether its values are equal but for rounding, or it has but one [R]."""
    drawn = w > 0
    least = np.where(drawn, values, np.inf).min(1)
    most = np.where(drawn, values, -np.inf).max(1)
    return most - least <= 1e-12 * np.maximum(1.0, np.maximum(np.abs(least), np.abs(most)))


def _ranks(values: Array, w: Array) -> Array:
    """[R, E]: the rank of each example's value in each resample; equal values share the mean."""
    groups, member = _groups(values)
    weight = _sums(w, member, groups)
    return (np.cumsum(weight, axis=1) - (weight - 1) / 2)[:, member]


def _correlation(one: Array, two: Array, w: Array) -> Array:
    total = w.sum(1, keepdims=True)
    one = one - _ratio((w * one).sum(1, keepdims=True), total)
    two = two - _ratio((w * two).sum(1, keepdims=True), total)
    spread = np.sqrt((w * one**2).sum(1)) * np.sqrt((w * two**2).sum(1))
    return np.clip(_ratio((w * one * two).sum(1), spread), -1, 1)  # past 1 by rounding


def _groups(values: Array) -> tuple[int, Array]:
    """How many different values there are, and which of them, in rising order, each one is [E]."""
    different, member = np.unique(values, return_inverse=True)
    return len(different), member


def _sums(w: Array, member: Array, groups: int) -> Array:
    """[R, groups]: the weight of each group."""
    order = np.argsort(member, kind="stable")
    starts = np.searchsorted(member[order], np.arange(groups))
    return np.add.reduceat(w[:, order], starts, axis=1)


def _ratio(above: Array, below: Array) -> Array:
    """above / below, 0 where that is 0 / 0."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below > 0)
