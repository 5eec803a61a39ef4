"""The learning rate's factor: warm-up, decay, and the ends of both."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_lora_cli.training.schedule import learning_rate_factor as factor

SCHEDULES = ["cosine", "linear", "constant"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_in_equal_steps_to_one(schedule: str) -> None:
    values = [factor(step, 100, 0.04, schedule) for step in range(5)]
    assert values == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_decay_by_hand() -> None:
    assert [factor(s, 4, 0.0, "linear") for s in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    expected = [(1 + math.cos(math.pi * s / 4)) / 2 for s in range(4)]
    assert [factor(s, 4, 0.0, "cosine") for s in range(4)] == pytest.approx(expected)
    assert [factor(s, 4, 0.0, "constant") for s in range(4)] == [1.0] * 4


def test_a_started_percent_of_warm_up_is_a_whole_step() -> None:
    assert factor(0, 10, 0.01, "constant") == 0.5
    assert factor(1, 10, 0.01, "constant") == 1.0


@given(st.integers(1, 500), st.floats(0, 0.99), st.sampled_from(SCHEDULES))
def test_every_step_learns_and_none_beyond_the_peak(
    total: int, warmup: float, schedule: str
) -> None:
    values = [factor(step, total, warmup, schedule) for step in range(total)]
    assert all(0 < value <= 1 for value in values)
    peak = values.index(max(values))
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)


def test_an_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'cosin'"):
        factor(3, 4, 0.0, "cosin")
