"""Metrics over resamples are those of the evaluation on the same examples."""

from __future__ import annotations

import numpy as np
import pytest

from mtl_lora_cli.evaluation import metrics as reference
from mtl_lora_cli.evaluation.metrics import Outcome
from mtl_lora_cli.evaluation.resampled import goodness, metric, resampled

TWO_CLASSES = ("f1", "roc_auc")
NUMBERS = ("pearson", "spearman")


def outcome_for(name: str, generator: np.random.Generator, examples: int = 60) -> Outcome:
    """Random answers with many ties, some of which name no choice."""
    classes = 2 if name in TWO_CLASSES else 3
    return Outcome(
        gold=generator.integers(0, classes, examples),
        predicted=generator.integers(0 if name in TWO_CLASSES else -1, classes, examples),
        gold_value=generator.integers(0, 5, examples).astype(float),
        predicted_value=generator.normal(size=examples).round(1),
        positive_score=generator.random(examples).round(1),
    )


@pytest.mark.parametrize("name", sorted(reference._METRICS))
def test_a_metric_is_the_evaluation_s(name: str) -> None:
    generator = np.random.default_rng(0)
    for _ in range(10):
        outcome = outcome_for(name, generator)
        assert metric(name, outcome) == pytest.approx(reference._METRICS[name](outcome))


@pytest.mark.parametrize("name", sorted(reference._METRICS))
def test_a_weight_is_an_example_that_stands_so_often(name: str) -> None:
    generator = np.random.default_rng(1)
    outcome = outcome_for(name, generator)
    places = generator.integers(60, size=(10, 60))
    weights = np.stack([np.bincount(row, minlength=60) for row in places])
    expected = [reference._METRICS[name](outcome.take(row)) for row in places]
    assert resampled(name, outcome, weights) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "expected"), [("roc_auc", 0.5), ("pearson", 0.0), ("spearman", 0.0), ("matthews", 0.0)]
)
def test_what_is_undefined_counts_as_guessing(name: str, expected: float) -> None:
    same, score = np.ones(4, dtype=int), np.full(4, 0.7)
    outcome = Outcome(same, same, score, score, score)
    assert metric(name, outcome) == expected


def test_a_number_s_answer_is_the_better_the_nearer_it_is() -> None:
    outcome = Outcome(np.zeros(2), np.zeros(2), np.array([1.0, 2.0]), np.array([1.5, 0.0]))
    assert goodness("pearson", outcome).tolist() == [-0.5, -2.0]
