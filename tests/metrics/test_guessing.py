"""What is called one answer, and what is called better than a guess."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import entropy

from mtl_lora_cli.metrics.guessing import beside_a_guess, no_better, one_answer

BALANCED = [0, 1] * 50


@pytest.mark.parametrize(
    ("gold", "predicted", "flagged"),
    [
        (BALANCED, [1] * 100, True),
        (BALANCED, [1] * 96 + [0] * 4, True),
        (BALANCED, [1] * 94 + [0] * 6, False),
        (BALANCED, [1] * 97 + [-1] * 3, True),  # an answer that cannot be read is no other answer
        (BALANCED, [-1] * 100, False),
        ([1] * 97 + [0] * 3, [1] * 100, True),  # rare answers are never given
        ([1] * 97 + [0] * 3, [1] * 98 + [0] * 2, False),
        ([1] * 100, [1] * 100, False),
        (BALANCED[:18], [1] * 18, False),
    ],
)
def test_one_answer(gold: list[int], predicted: list[int], flagged: bool) -> None:
    found = one_answer(gold, np.asarray(predicted))
    assert (found is not None) == flagged
    if found is not None:
        assert found.choice == 1
        assert found.share == predicted.count(1) / len(predicted)
        assert found.right == gold.count(1) / len(gold)


def test_a_guess_by_shares_is_the_entropy_of_the_right_answers() -> None:
    gold = [0] * 70 + [1] * 20 + [2] * 10
    prior = np.log([0.7, 0.2, 0.1])
    found = beside_a_guess(
        gold, [prior + number for number in range(100)]
    )  # any constant is dropped
    assert found.guess == pytest.approx(entropy([0.7, 0.2, 0.1]), abs=1e-12)
    assert found.loss == pytest.approx(found.guess, abs=1e-9)
    assert not found.better


@pytest.mark.parametrize(("strength", "better"), [(0.0, False), (2.0, True), (-2.0, False)])
def test_answers_that_follow_the_rows_are_better(strength: float, better: bool) -> None:
    generator = np.random.default_rng(0)
    gold = generator.integers(2, size=400)
    hints = np.stack([gold == 0, gold == 1], axis=1) + generator.normal(0, 1, (400, 2))
    assert beside_a_guess(gold, list(strength * hints)).better == better


def test_a_chance_hit_on_few_rows_is_not() -> None:
    generator = np.random.default_rng(1)
    called = [
        beside_a_guess(
            generator.integers(2, size=30), list(generator.normal(0, 0.3, (30, 2)))
        ).better
        for _ in range(200)
    ]
    assert np.mean(called) < 0.05


@pytest.mark.parametrize(
    ("strength", "sharpness", "flagged"),
    [
        (0.0, 1.0, True),  # nothing to do with the rows
        (2.0, 1.0, False),
        (2.0, 40.0, False),  # sure of itself and often wrong: a bad loss, and yet it has learned
        (-2.0, 1.0, True),
    ],
)
def test_answers_like_a_guess_are_called_so(
    strength: float, sharpness: float, flagged: bool
) -> None:
    generator = np.random.default_rng(0)
    gold = generator.integers(2, size=400)
    hints = strength * np.stack([gold == 0, gold == 1], axis=1) + generator.normal(0, 1, (400, 2))
    scores = list(sharpness * hints)
    predicted = [int(row.argmax()) for row in scores]
    found = no_better(gold, predicted, scores)
    assert (found is not None) == flagged
    if sharpness > 1:
        assert not beside_a_guess(gold, scores).better
    assert no_better(gold[:19], predicted[:19], scores[:19]) is None
    assert no_better(np.zeros(400, int), predicted, scores) is None  # nothing to be told apart
