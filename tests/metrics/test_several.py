"""Rows that were answered several times."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from mtl_lora_cli.metrics import Outcome
from mtl_lora_cli.metrics.several import measure_mean, pass_at

RIGHT = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]])
OUTCOMES = [Outcome(np.zeros(4, int), np.where(own, 0, -1)) for own in RIGHT.T]


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_pass_at_k_is_the_share_of_picks_with_a_right_answer(k: int) -> None:
    """All k of the five answers, one after another."""
    picks = [[any(row[list(some)]) for some in combinations(range(5), k)] for row in RIGHT]
    found = pass_at(OUTCOMES)
    assert list(found) == [1, 2, 4, 5]
    assert found[k].value == pytest.approx(np.mean(picks))
    assert found[k].low is not None and found[k].low <= np.mean(picks) <= found[k].high


def test_the_mean_over_answers() -> None:
    found = measure_mean("exact_match", OUTCOMES)
    assert found.value == pytest.approx(RIGHT.mean())
    generator = np.random.default_rng(1)
    rows = generator.integers(4, size=(20_000, 4))  # a row is drawn with all its answers
    low, high = np.quantile(RIGHT.mean(1)[rows].mean(1), [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.05) and found.high == pytest.approx(high, abs=0.05)


def test_resamples_that_agree_say_nothing() -> None:
    assert pass_at([OUTCOMES[0], OUTCOMES[0]])[2].low is not None
    same = [Outcome(np.zeros(3, int), np.zeros(3, int))] * 2
    assert (pass_at(same)[2].value, pass_at(same)[2].low) == (1.0, None)
