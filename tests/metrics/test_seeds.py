"""Means, intervals and tests against numbers that were computed by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from mtl_lora_cli.metrics import Outcome
from mtl_lora_cli.metrics.seeds import (
    TaskRuns,
    bootstrap_p,
    compare,
    example_weights,
    holm,
    seed_shares,
    sign_test,
)


def answered(right: str) -> Outcome:
    """An outcome from a word such as `1101`: which examples were answered rightly."""
    gold = np.ones(len(right), dtype=int)
    return Outcome(gold, np.array([int(letter) for letter in right]))


def runs(right: Mapping[str, Sequence[str]]) -> TaskRuns:
    return TaskRuns("accuracy", {m: [answered(word) for word in own] for m, own in right.items()})


TASKS = {
    "one": runs({"lora": ["1100", "1000"], "mtl-lora": ["1110", "1101"]}),
    "two": runs({"lora": ["11", "10"], "mtl-lora": ["10", "00"]}),
}


def test_the_mean_over_seeds_by_hand() -> None:
    found = compare(TASKS, "lora").tasks
    assert found["lora"]["one"].seeds == (0.5, 0.25)
    assert found["lora"]["one"].value == 0.375
    assert found["mtl-lora"]["one"].value == 0.75


def test_the_average_is_the_mean_over_tasks() -> None:
    found = compare(TASKS, "lora").average
    assert found["lora"].value == pytest.approx((0.375 + 0.75) / 2)
    assert found["mtl-lora"].value == pytest.approx((0.75 + 0.25) / 2)
    assert found["lora"].seeds == pytest.approx((0.75, 0.375))


def test_gains_are_relative_and_have_a_direction() -> None:
    """Δm = (100 / T) Σ ± (Y − Y_0) / Y_0 of each seed; of the rows' mean squares the lower is better."""
    squares = {"a": [[4.0, 0.0], [9.0, 9.0]], "b": [[1.0, 1.0], [4.0, 12.0]]}
    none = np.zeros(2, dtype=int)
    depth = TaskRuns(
        "depth_rmse",
        {
            # Of each image of one pixel: pixels, squares, what this metric leaves alone.
            m: [
                Outcome(none, none, tallies=np.array([[1, x, *[0] * 5] for x in row]))
                for row in own
            ]
            for m, own in squares.items()
        },
    )
    found = compare({"one": runs({"a": ["10", "10"], "b": ["11", "10"]}), "depth": depth}, "a",
                    gains_over="a")  # fmt: skip
    rmse = {m: [np.sqrt(np.mean(row)) for row in own] for m, own in squares.items()}
    by_seed = [
        50 * ((b - a) / a + (r_a - r_b) / r_a)
        for a, b, r_a, r_b in zip((0.5, 0.5), (1.0, 0.5), rmse["a"], rmse["b"], strict=True)
    ]
    assert found.average["b"].seeds == pytest.approx(by_seed)
    assert found.average["b"].value == pytest.approx(np.mean(by_seed))
    assert found.average["a"].seeds == (0, 0) and found.average["a"].high == 0
    assert found.tasks["b"]["depth"].value == pytest.approx(np.mean(rmse["b"]))
    assert found.task_differences["b"]["depth"].p_sign is None


def test_differences_by_hand() -> None:
    found = compare(TASKS, "lora")
    assert found.task_differences["mtl-lora"]["one"].value == pytest.approx(0.375)
    assert found.task_differences["mtl-lora"]["two"].value == pytest.approx(-0.5)
    assert found.average_differences["mtl-lora"].value == pytest.approx(-0.0625)


def test_the_baseline_is_not_compared_with_itself() -> None:
    assert set(compare(TASKS, "lora").average_differences) == {"mtl-lora"}


def test_nothing_varies_where_everything_is_right() -> None:
    found = compare({"t": runs({"lora": ["1111", "1111"], "mtl-lora": ["1111", "1111"]})}, "lora")
    one = found.average["lora"]
    assert (one.low, one.value, one.high) == (1.0, 1.0, 1.0)


def test_seeds_alone_vary_where_all_examples_are_alike() -> None:
    """One seed of two is drawn: 0 or 1, each half of the times."""
    one = compare({"t": runs({"lora": ["0000", "1111"]})}, "lora").average["lora"]
    assert (one.low, one.value, one.high) == (0.0, 0.5, 1.0)


def test_examples_alone_vary_with_one_seed() -> None:
    """The mean of 100 draws of 0 or 1 has a standard deviation of 0.05."""
    one = compare({"t": runs({"lora": ["10" * 50]})}, "lora").average["lora"]
    assert one.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015)
    assert one.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.015)


def test_seeds_do_not_make_examples_more() -> None:
    """Three seeds with the same answers are as sure as one: they were asked the same examples."""
    alone = compare({"t": runs({"lora": ["10" * 50]})}, "lora").average["lora"]
    thrice = compare({"t": runs({"lora": ["10" * 50] * 3})}, "lora").average["lora"]
    assert (thrice.low, thrice.high) == pytest.approx((alone.low, alone.high))


def test_what_methods_share_leaves_the_difference() -> None:
    """Both vary by seed and by example, and one is right wherever the other is and nowhere else."""
    words = ["1100", "0111", "1111"]
    found = compare({"t": runs({"lora": words, "mtl-lora": words})}, "lora")
    difference = found.average_differences["mtl-lora"]
    assert (difference.low, difference.value, difference.high) == (0.0, 0.0, 0.0)
    assert difference.p == 1.0


def test_the_seeds_part_of_the_spread_is_unbiased() -> None:
    """The variance of the mean of S seeds is s² / S with the unbiased s²."""
    values = np.array([0.1, 0.4, 0.7])
    means = seed_shares(3, 200_000, seed=0) @ values
    assert means.var() == pytest.approx(values.var(ddof=1) / 3, rel=0.02)


def test_as_many_examples_are_drawn() -> None:
    parts = example_weights(7, 600, "t", seed=0)
    assert sum(len(part) for part in parts) == 600
    assert all((part.sum(1) == 7).all() for part in parts)


def test_a_task_s_draw_does_not_depend_on_the_others() -> None:
    alone = compare({"two": TASKS["two"]}, "lora").tasks["lora"]["two"]
    assert compare(TASKS, "lora").tasks["lora"]["two"] == alone


def test_p_by_hand() -> None:
    """Of 9 resamples 2 are not above zero: p = 2 (2 + 1) / (9 + 1)."""
    assert bootstrap_p(np.array([-1, 0, 1, 1, 1, 1, 1, 1, 1])) == pytest.approx(0.6)


def test_p_of_a_difference_that_is_always_there() -> None:
    assert bootstrap_p(np.ones(1999)) == pytest.approx(2 / 2000)


def test_the_sign_test_is_mcnemar_s_for_one_seed() -> None:
    """Five examples differ, all one way: p = 2 / 2⁵."""
    table = runs({"lora": ["0000011"], "mtl-lora": ["1111111"]})
    assert sign_test(table, "mtl-lora", "lora") == pytest.approx(2 / 32)


def test_the_sign_test_counts_each_example_once_for_all_seeds() -> None:
    """Example 1 is better twice, example 2 once better and once worse: one sign."""
    table = runs({"lora": ["01", "00"], "mtl-lora": ["10", "11"]})
    assert sign_test(table, "mtl-lora", "lora") == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


def test_what_stands_apart_is_not_counted_in_the_correction() -> None:
    tables = {
        name: TaskRuns("accuracy", {**one.outcomes, "untrained": one.outcomes["lora"]})
        for name, one in TASKS.items()
    }
    found = compare(tables, "lora", apart=("untrained",)).average_differences
    assert found["mtl-lora"].p_holm == found["mtl-lora"].p
    assert found["untrained"].p_holm is None
