"""Two models on the same examples, against what numpy and scipy say of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from mtl_lora_cli.metrics import Outcome
from mtl_lora_cli.metrics.paired import example_weights, paired, sampled

EXAMPLES, CLASSES = 120, 3


def answered(gold: np.ndarray, right: float, seed: int) -> Outcome:
    """Right in about that share of the examples, elsewhere any class."""
    generator = np.random.default_rng(seed)
    guess = generator.integers(CLASSES, size=len(gold))
    return Outcome(gold, np.where(generator.random(len(gold)) < right, gold, guess))


@pytest.fixture
def gold() -> np.ndarray:
    return np.random.default_rng(0).integers(CLASSES, size=EXAMPLES)


def test_accuracy_is_tested_by_mcnemar(gold: np.ndarray) -> None:
    good, poor = answered(gold, 0.8, 1), answered(gold, 0.3, 2)
    found = paired("accuracy", good, poor, "task")
    right = [one.gold == one.predicted for one in (good, poor)]
    only = [int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())]
    assert found.test == "mcnemar"
    assert found.p == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    assert found.difference == pytest.approx(right[0].mean() - right[1].mean())
    assert found.low < found.difference < found.high
    back = paired("accuracy", poor, good, "task")
    assert (back.difference, back.low, back.high) == pytest.approx(
        (-found.difference, -found.high, -found.low)
    )


def test_other_metrics_are_scored_on_the_same_draws(gold: np.ndarray) -> None:
    """Example by example, by scikit-learn: the interval is that of the differences."""
    good, poor = answered(gold, 0.6, 1), answered(gold, 0.5, 2)
    found = paired("macro_f1", good, poor, "task", resamples=200)
    differences = []
    for weights in np.concatenate(example_weights(EXAMPLES, 200, "task", 0)):
        drawn = np.repeat(np.arange(EXAMPLES), weights.astype(int))
        scores = [
            sk.f1_score(one.gold[drawn], one.predicted[drawn], average="macro")
            for one in (good, poor)
        ]
        differences.append(scores[0] - scores[1])
    assert (found.low, found.high) == pytest.approx(np.quantile(differences, [0.025, 0.975]))
    below = min(np.sum(np.array(differences) <= 0), np.sum(np.array(differences) >= 0))
    assert found.p == pytest.approx(min(1, 2 * (below + 1) / 201))
    assert found.test == "bootstrap"


def test_a_model_is_not_better_than_itself(gold: np.ndarray) -> None:
    one = answered(gold, 0.6, 1)
    for name in ("accuracy", "macro_f1", "matthews"):
        found = paired(name, one, one, "task")
        assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_one_row_says_nothing_of_the_next() -> None:
    """Not even where it is answered better: exact p is 1, of five rows alike it is 2 / 2⁵."""
    for rows, p in ((1, 1.0), (5, 2 / 2**5)):
        right, wrong = (Outcome(np.ones(rows, int), np.full(rows, one)) for one in (1, 0))
        for name in ("accuracy", "f1"):
            found = paired(name, right, wrong, "task")
            assert (found.difference, found.low, found.high) == (1, None, None)
            assert (found.p, found.test) == (p, "mcnemar")


def test_a_task_s_draws_are_its_own(gold: np.ndarray) -> None:
    one = answered(gold, 0.6, 1)
    assert np.array_equal(sampled("accuracy", one, "a"), sampled("accuracy", one, "a"))
    assert not np.array_equal(sampled("accuracy", one, "a"), sampled("accuracy", one, "b"))


def test_other_examples_cannot_be_paired(gold: np.ndarray) -> None:
    with pytest.raises(ValueError, match="120 and 119"):
        paired("accuracy", answered(gold, 0.5, 1), answered(gold[1:], 0.5, 1), "task")
