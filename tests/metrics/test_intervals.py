"""Metrics against other ways to the same numbers, and what is said where there is none."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from mtl_lora_cli.metrics import Outcome
from mtl_lora_cli.metrics import intervals as metrics
from mtl_lora_cli.metrics.intervals import Measured, mcnemar, measure, wilson

NAMES = ("accuracy", "exact_match", "macro_f1", "matthews", "quadratic_kappa", "f1", "roc_auc")


@pytest.fixture(scope="module", autouse=True)
def _few_resamples() -> Iterator[None]:
    """A thousand bootstrap samples take a second and more a metric."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "RESAMPLES", 40)
        yield


def outcome(size: int = 200, classes: int = 2, seed: int = 0, **changes: Any) -> Outcome:
    generator = np.random.default_rng(seed)
    gold = generator.integers(classes, size=size)
    right = generator.random(size) < 0.7
    predicted = np.where(right, gold, generator.integers(classes, size=size))
    values = generator.random(size) * 5
    parts: dict[str, Any] = {
        "gold": gold,
        "predicted": predicted,
        "gold_value": values,
        "predicted_value": values + generator.normal(size=size),
        "positive_score": np.clip(predicted * 0.5 + generator.random(size) * 0.5, 0, 1),
    }
    return Outcome(**{**parts, **changes})


def test_wilson_by_hand() -> None:
    z = 1.959963984540054
    for right, total in [(0, 10), (10, 10), (7, 10), (340, 400)]:
        p = right / total
        centre = (p + z * z / (2 * total)) / (1 + z * z / total)
        half = (
            z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
        )
        assert wilson(right, total) == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_mcnemar_by_hand() -> None:
    # 1 against 5 of six differing answers: 2 · (1 + 6) / 2^6.
    first = [True] + [False] * 5 + [True, False]
    second = [False] + [True] * 5 + [True, False]
    assert mcnemar(first, second) == pytest.approx(2 * 7 / 64)
    assert mcnemar(second, first) == pytest.approx(2 * 7 / 64)
    assert mcnemar([True, False], [True, False]) == 1.0
    assert mcnemar([False] * 20, [True] * 20) == pytest.approx(2 / 2**20)
    with pytest.raises(ValueError, match="3 and 2 examples"):
        mcnemar([True, True, False], [True, False])


@pytest.mark.parametrize("classes", [2, 3])
def test_values_are_those_of_scikit_learn(classes: int) -> None:
    o = outcome(classes=classes)
    expected = {
        "accuracy": sk.accuracy_score(o.gold, o.predicted),
        "macro_f1": sk.f1_score(o.gold, o.predicted, average="macro"),
        "matthews": sk.matthews_corrcoef(o.gold, o.predicted),
        "quadratic_kappa": sk.cohen_kappa_score(o.gold, o.predicted, weights="quadratic"),
        "pearson": np.corrcoef(o.gold_value, o.predicted_value)[0, 1],
        "spearman": stats.spearmanr(o.gold_value, o.predicted_value).statistic,
    }
    if classes == 2:
        expected["f1"] = sk.f1_score(o.gold, o.predicted)
        expected["roc_auc"] = sk.roc_auc_score(o.gold, o.positive_score)
    for name, value in expected.items():
        measured = measure(name, o)
        assert measured.value == pytest.approx(float(value), abs=1e-12), name
        assert measured.low is not None
        assert measured.high is not None
        assert measured.low < measured.value < measured.high
        assert measured.why is None


def test_the_positive_class_may_be_the_first_choice() -> None:
    o = outcome(positive=0)
    f1 = sk.f1_score(o.gold, o.predicted, pos_label=0)
    assert measure("f1", o).value == pytest.approx(float(f1))
    auc = sk.roc_auc_score(1 - o.gold, o.positive_score)
    assert measure("roc_auc", o).value == pytest.approx(float(auc))


def test_the_interval_is_of_the_positive_class_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five of six are right: a third of the resamples lack the wrong one, and come to 1."""
    monkeypatch.setattr(metrics, "RESAMPLES", 400)
    for positive in (0, 1):
        gold = np.array([1, 1, 1, 1, 1, 0]) if positive else np.array([0, 0, 0, 0, 0, 1])
        found = measure("f1", Outcome(gold, np.full(6, positive), positive=positive))
        assert (found.value, found.high) == (pytest.approx(10 / 11), 1.0)


def test_an_interval_is_the_same_each_time_and_shrinks_with_size() -> None:
    assert measure("macro_f1", outcome()) == measure("macro_f1", outcome())
    widths = []
    for size in (50, 5000):
        measured = measure("matthews", outcome(size=size))
        assert measured.low is not None
        assert measured.high is not None
        widths.append(measured.high - measured.low)
    assert widths[1] < widths[0] / 5


def test_a_bootstrap_interval_is_near_wilsons(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two balanced classes macro-averaged F1 and accuracy nearly agree."""
    monkeypatch.setattr(metrics, "RESAMPLES", 250)
    o = outcome(size=1000)
    accuracy, f1 = measure("accuracy", o), measure("macro_f1", o)
    assert f1.low == pytest.approx(accuracy.low, abs=0.015)
    assert f1.high == pytest.approx(accuracy.high, abs=0.015)


EQUAL = np.zeros(20, dtype=int)
MIXED = np.arange(20) % 2


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        (
            "matthews",
            {"gold": EQUAL, "predicted": EQUAL},
            "only one class among gold and predicted",
        ),
        ("quadratic_kappa", {"gold": EQUAL, "predicted": EQUAL}, "only one class among gold and"),
        (
            "f1",
            {"gold": EQUAL, "predicted": EQUAL},
            "no row has the positive class, and none is given",
        ),
        (
            "f1",
            {"gold": EQUAL, "predicted": EQUAL - 1},
            "no row has the positive class, and none is",
        ),
        (
            "f1",
            {"gold": 1 - EQUAL, "predicted": 1 - EQUAL, "positive": 0},
            "no row has the positive",
        ),
        (
            "pearson",
            {"predicted_value": 3.3 + 1e-14 * np.arange(20)},
            "all predicted values are equal",
        ),
        ("roc_auc", {"gold": EQUAL}, "only one class among the gold labels"),
        ("pearson", {"gold_value": np.ones(20)}, "all gold values are equal"),
        ("spearman", {"predicted_value": np.ones(20)}, "all predicted values are equal"),
    ],
)
def test_an_undefined_metric_says_why(name: str, changes: dict[str, Any], why: str) -> None:
    measured = measure(name, outcome(20, **changes))
    assert (measured.value, measured.low, measured.high) == (None, None, None)
    assert measured.why is not None
    assert why in measured.why


@pytest.mark.parametrize("name", [*NAMES, "pearson", "spearman"])
def test_no_examples_say_why(name: str) -> None:
    empty = outcome(20).take(np.arange(0))
    assert measure(name, empty) == Measured(None, why="no examples")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("gold", "predicted"),
    [(EQUAL, EQUAL), (EQUAL, MIXED), (MIXED, EQUAL), (MIXED, MIXED), (MIXED, 1 - MIXED)],
)
def test_degenerate_answers_give_a_number_or_a_reason_and_no_warning(
    name: str, gold: np.ndarray, predicted: np.ndarray
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured = measure(name, outcome(20, gold=gold, predicted=predicted))
    assert (measured.value is None) == (measured.why is not None)
    assert measured.value is None or math.isfinite(measured.value)
    if measured.low is None or measured.high is None:
        assert measured.low is measured.high is None
        return
    # Answers that are all alike come to 0 on the next rows, too; what is all right need not.
    alike = measured.value == 0 and (predicted == predicted[0]).all()
    assert measured.value is not None
    assert measured.low <= measured.value <= measured.high
    assert (measured.low < measured.high) != alike


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_small_samples_never_give_nan(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 4))
    name = data.draw(st.sampled_from([*NAMES, "pearson", "spearman"]))
    classes = st.lists(st.integers(0, 1), min_size=size, max_size=size)
    values = st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=size, max_size=size)
    parts = {
        "gold": np.asarray(data.draw(classes)),
        "predicted": np.asarray(data.draw(classes)),
        "gold_value": np.asarray(data.draw(values)),
        "predicted_value": np.asarray(data.draw(values)),
        "positive_score": np.asarray(data.draw(values)) / 2.5,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured = measure(name, Outcome(**parts))
    for number in (measured.value, measured.low, measured.high):
        assert number is None or math.isfinite(number)
    assert (measured.value is None) == (measured.why is not None)


def test_an_unknown_metric() -> None:
    with pytest.raises(KeyError):
        measure("acuracy", outcome())
