"""Ranks at which methods train equally many values."""

from __future__ import annotations

import pytest

from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.compare.matching import (
    alpha_at,
    common_target,
    count_at,
    match_rank,
)
from mtl_lora_cli.errors import UsageError

SHAPES = {"q_proj": (64, 64), "o_proj": (32, 64)}  # (out, in)


def test_lora_against_its_formula() -> None:
    count = count_at(configure(method="lora"), SHAPES, tasks=3)
    assert count(5) == 5 * (64 + 64) + 5 * (64 + 32)  # r (in + out) each


def test_mtl_lora_against_its_formula() -> None:
    config = configure(method="mtl-lora", up_projections=2)
    # r (in + 2 out) + 3 r² + 3 · 2 each
    expected = 4 * (64 + 128) + 48 + 6 + 4 * (64 + 64) + 48 + 6
    assert count_at(config, SHAPES, tasks=3)(4) == expected


def test_layers_are_counted_each_by_its_own_parts() -> None:
    config = configure(method="mtlora", task_rank=2, task_modules=("o_proj",))
    assert count_at(config, SHAPES, tasks=3)(5) == 5 * 128 + (5 + 3 * 2) * 96


@pytest.mark.parametrize(("target", "rank"), [(224, 1), (1344, 6), (1360, 6), (2240, 10)])
def test_the_nearest_rank_is_picked(target: int, rank: int) -> None:
    assert match_rank("lora", lambda r: 224 * r, target) == rank


def test_of_two_equally_near_ranks_the_lower_is_picked() -> None:
    assert match_rank("lora", lambda r: 2 * r, 201) == 100


def test_ranks_that_a_method_cannot_have_are_left_out() -> None:
    assert match_rank("moelora", lambda r: 10 * r, 1590, step=8) == 160


def test_a_method_that_cannot_come_near_is_refused_with_its_neighbours() -> None:
    expected = (
        r"lora cannot come within 2% of 1,000 trained values: "
        r"rank 4 has 896 \(-10.4%\), rank 5 has 1,120 \(\+12.0%\)"
    )
    with pytest.raises(UsageError, match=expected):
        match_rank("lora", lambda r: 224 * r, 1000)


def test_a_target_below_rank_one_is_refused() -> None:
    with pytest.raises(UsageError, match=r"rank 1 has 224.*there is none below it"):
        match_rank("lora", lambda r: 224 * r, 100)


def test_a_target_that_suits_all_is_found() -> None:
    # 390 = 13 · 30 and 396 = 9 · 44 are the first multiples within 2 % of each other.
    assert common_target([(lambda r: 30 * r, 1), (lambda r: 44 * r, 1)], 300) == 390


def test_no_target_suits_all() -> None:
    assert common_target([(lambda r: 30 * r, 1), (lambda r: 44 * r, 1)], 100) is None


@pytest.mark.parametrize(("scaling", "alpha"), [("rank", 64.0), ("sqrt_rank", 32.0)])
def test_the_scale_is_kept(scaling: str, alpha: float) -> None:
    """16 / 8 = 64 / 32, and 16 / √8 = 32 / √32."""
    assert alpha_at(32, 16.0, 8, scaling) == pytest.approx(alpha)
