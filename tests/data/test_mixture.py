"""The stream of rows: who is in an epoch, how often, and that it can be found again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from fractions import Fraction
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_lora_cli.data.dynamic import DynamicMixture
from mtl_lora_cli.data.epoch_rows import Place
from mtl_lora_cli.data.mixture import (
    Mixture,
    counts,
    draw,
    planned_epochs,
    shares,
    subset,
)
from mtl_lora_cli.data.stages import Part, StagedMixture

SIZES = st.lists(st.integers(1, 400), min_size=1, max_size=6)


def mixture(sizes: tuple[int, ...] = (40, 7, 90), **keys: Any) -> Mixture:
    generator = np.random.default_rng(0)
    return Mixture(
        names=tuple(f"task{number}" for number in range(len(sizes))),
        lengths=tuple(generator.integers(3, 20, size=size) for size in sizes),
        **{"row_length": 32, "rows_per_step": 4, "seed": 5, **keys},
    )


def places(rows: Sequence[list[Place]]) -> list[Place]:
    return list(chain.from_iterable(rows))


@given(SIZES)
def test_proportional_shares_draw_every_example_once(sizes: list[int]) -> None:
    assert counts(sizes, shares(sizes, "proportional", [])) == sizes


@given(SIZES, st.data())
def test_counts_add_up_and_lie_next_to_the_shares(sizes: list[int], data: st.DataObject) -> None:
    weights = data.draw(
        st.lists(st.floats(0, 10), min_size=len(sizes), max_size=len(sizes)).filter(
            lambda values: sum(values) > 1e-3
        )
    )
    wanted = shares(sizes, "weights", weights)
    got = counts(sizes, wanted)
    assert sum(got) == sum(sizes)
    assert all(abs(n - share * sum(sizes)) < 1 for n, share in zip(got, wanted, strict=True))


POSITIVE = st.floats(0, allow_infinity=False, exclude_min=True)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=6).filter(any), POSITIVE)
def test_any_temperature_gives_shares(sizes: list[int], temperature: float) -> None:
    """Against exponentials of logarithms, at the edges of what a float holds, too."""
    found = np.array(shares(sizes, "temperature", [], temperature))
    with np.errstate(divide="ignore", over="ignore"):
        logarithms = np.log(np.array(sizes, dtype=np.float64))
        powers = np.exp((logarithms - logarithms.max()) / temperature)
    powers[np.array(sizes) == max(sizes)] = 1.0
    np.testing.assert_allclose(found, powers / powers.sum(), rtol=1e-9, atol=1e-12)
    assert sum(counts(sizes, found.tolist())) == sum(sizes)


@given(st.lists(st.one_of(POSITIVE, st.just(0.0)), min_size=1, max_size=6).filter(any))
def test_any_weights_give_shares(weights: list[float]) -> None:
    found = shares([3] * len(weights), "weights", weights)
    assert abs(sum(found) - 1) < 1e-9
    exact = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    assert found == pytest.approx([float(value) for value in exact], rel=1e-6, abs=1e-12)


def test_the_largest_task_has_all_at_a_temperature_near_zero() -> None:
    assert mixture(strategy="temperature", temperature=1e-3).planned_counts() == [0, 0, 137]


def test_steps_are_counted_no_further_than_asked() -> None:
    """Billions of epochs of a few rows: none behind the last step is looked at."""
    mixed = mixture()
    assert mixed.steps_in(1e12, at_most=50) == 50
    assert mixed.steps_in(2, at_most=10**6) == mixed.steps_in(2)
    assert mixed.steps_in(0.5, at_most=1) == 1


@given(SIZES, st.floats(1, 1000))
def test_temperature_lies_between_proportional_and_uniform(sizes: list[int], t: float) -> None:
    got = shares(sizes, "temperature", [], t)
    assert sum(got) == pytest.approx(1)
    for which in (max, min):  # the largest task gives, the smallest gains, neither passes 1 / T
        place = sizes.index(which(sizes))
        ends = sorted((sizes[place] / sum(sizes), 1 / len(sizes)))
        assert ends[0] - 1e-9 <= got[place] <= ends[1] + 1e-9


def test_the_shares_by_hand() -> None:
    sizes = [100, 400]
    assert shares(sizes, "proportional", []) == pytest.approx([0.2, 0.8])
    assert shares(sizes, "uniform", []) == pytest.approx([0.5, 0.5])
    assert shares(sizes, "weights", [3, 1]) == pytest.approx([0.75, 0.25])
    assert shares(sizes, "temperature", [], 2.0) == pytest.approx([1 / 3, 2 / 3])
    assert shares(sizes, "temperature", [], 1.0) == pytest.approx([0.2, 0.8])


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [40, 7, 90]),
        ({"strategy": "uniform"}, [46, 46, 45]),
        ({"strategy": "weights", "weights": (1.0, 0.0, 3.0)}, [34, 0, 103]),
        ({"strategy": "temperature", "temperature": 2.0}, [47, 20, 70]),
    ],
)
def test_an_epoch_reaches_the_shares(keys: dict[str, Any], expected: list[int]) -> None:
    rows = mixture(**keys).epoch(0)
    got = Counter(task for task, _ in places(rows))
    assert all(abs(got[task] - count) <= 1 for task, count in enumerate(expected))
    assert sum(got.values()) == 137


def test_a_proportional_epoch_holds_each_example_exactly_once() -> None:
    mixed = mixture()
    everything = [(t, n) for t, size in enumerate((40, 7, 90)) for n in range(size)]
    for number in range(3):
        assert sorted(places(mixed.epoch(number))) == everything


def test_a_small_task_is_repeated_evenly() -> None:
    drawn = Counter(n for t, n in places(mixture(strategy="uniform").epoch(0)) if t == 1)
    assert set(drawn) == set(range(7))
    assert max(drawn.values()) - min(drawn.values()) <= 1


def test_a_large_task_is_never_repeated_within_an_epoch() -> None:
    drawn = Counter(n for t, n in places(mixture(strategy="uniform").epoch(0)) if t == 2)
    assert set(drawn.values()) == {1}


def test_every_epoch_draws_anew() -> None:
    mixed = mixture(strategy="uniform")
    first, second = mixed.epoch(0), mixed.epoch(1)
    assert first != second
    assert {n for t, n in places(first) if t == 2} != {n for t, n in places(second) if t == 2}


def test_rows_mix_tasks_and_hold_their_examples() -> None:
    mixed = mixture()
    rows = mixed.epoch(0)
    for row in rows:
        assert sum(int(mixed.lengths[task][number]) for task, number in row) <= 32
    assert sum(len({task for task, _ in row}) > 1 for row in rows) > len(rows) / 3


def test_long_rows_are_not_learned_first() -> None:
    """Packing puts the longest examples into the first rows; the stream must not."""
    mixed = mixture((500,))
    longest = [max(int(mixed.lengths[t][n]) for t, n in row) for row in mixed.epoch(0)]
    half = len(longest) // 2
    assert abs(np.mean(longest[:half]) - np.mean(longest[half:])) < 2


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 40))
def test_any_step_can_be_found_again(step: int) -> None:
    whole = [mixture().step(number) for number in range(41)]
    assert mixture().step(step) == whole[step]


def test_steps_walk_through_whole_epochs() -> None:
    mixed = mixture()
    per_epoch = mixed.steps_in(1)
    for number in range(2):
        rows: list[list[Place]] = []
        for step in range(number * per_epoch, mixed.steps_in(number + 1)):
            epoch, part = mixed.step(step)
            assert epoch == number
            assert 1 <= len(part) <= 4
            rows += part
        assert rows == mixed.epoch(number)


def test_a_part_of_an_epoch_is_a_part_of_its_steps() -> None:
    mixed = mixture()
    whole = mixed.steps_in(1)
    assert mixed.steps_in(0.5) == round(whole / 2)
    assert mixed.steps_in(1e-9) == 1
    assert whole < mixed.steps_in(1.5) < mixed.steps_in(2)


def test_another_seed_is_another_stream() -> None:
    assert mixture().epoch(0) != replace(mixture(), seed=6).epoch(0)


def test_two_mixtures_do_not_share_their_epochs() -> None:
    one, two = mixture((5, 5)), mixture((9, 2))
    assert len(places(one.epoch(0))) == 10
    assert len(places(two.epoch(0))) == 11


def test_a_further_task_changes_no_other_tasks_draw() -> None:
    few = [n for t, n in sorted(places(mixture((40, 90), strategy="uniform").epoch(0))) if t == 0]
    assert few == sorted(draw(40, len(few), 5, 0, "task0").tolist())


@given(st.integers(1, 50), st.integers(0, 200), st.integers(0, 3))
def test_a_draw_passes_over_everything_before_it_repeats(size: int, count: int, epoch: int) -> None:
    drawn = draw(size, count, 7, epoch, "t")
    assert len(drawn) == count
    times = np.bincount(drawn, minlength=size) if count else np.zeros(size)
    assert len(times) == size
    assert times.max() - times.min() <= 1


@given(st.integers(0, 100), st.none() | st.integers(1, 120))
def test_a_subset_is_the_same_each_time(size: int, at_most: int | None) -> None:
    kept = subset(size, at_most, 3, "t")
    assert kept.tolist() == subset(size, at_most, 3, "t").tolist()
    assert len(kept) == (size if at_most is None else min(size, at_most))
    assert sorted(set(kept.tolist())) == kept.tolist()
    assert all(0 <= number < size for number in kept)


def test_a_subset_differs_by_seed_and_task_and_is_no_prefix() -> None:
    kept = subset(100, 20, 3, "t").tolist()
    assert kept != list(range(20))
    assert kept != subset(100, 20, 4, "t").tolist()
    assert kept != subset(100, 20, 3, "u").tolist()


def test_planned_epochs_count_what_is_drawn() -> None:
    mixed = mixture()
    assert planned_epochs(mixed, mixed.steps_in(2)) == {"task0": 2.0, "task1": 2.0, "task2": 2.0}


@given(st.integers(0, 5))
@settings(max_examples=6, deadline=None)
def test_rows_of_one_task_hold_what_mixed_rows_do(seed: int) -> None:
    mixed, apart = mixture(seed=seed), mixture(seed=seed, one_task=True)
    assert all(len({task for task, _ in row}) == 1 for row in apart.epoch(0))
    assert sorted(places(apart.epoch(0))) == sorted(places(mixed.epoch(0)))
    assert any(len({task for task, _ in row}) > 1 for row in mixed.epoch(0))


def staged(*parts: Part, **keys: Any) -> StagedMixture:
    plain = mixture(**keys)
    own = {one.name: getattr(plain, one.name) for one in fields(Mixture)}
    return StagedMixture(**own, parts=parts)


def test_stages_are_mixtures_of_their_tasks_one_after_another() -> None:
    one = staged(Part((0, 1), 1.5), Part((0, 1, 2), 1.0))
    first = mixture((40, 7))
    early = replace(first, lengths=one.lengths[:2])
    assert one.steps_in(1) == early.steps_in(1.5) + mixture().steps_in(1)
    for step in range(early.steps_in(1.5)):
        assert one.step(step) == early.step(step)
    epochs, seen = set(), []
    for step in range(early.steps_in(1.5), one.steps_in(1)):
        epoch, rows = one.step(step)
        epochs.add(epoch)
        seen += places(rows)
    assert epochs == {
        2
    }  # one and a half epochs are behind it, and it draws in another order than they
    assert sorted(seen) == [(task, n) for task, size in enumerate((40, 7, 90)) for n in range(size)]
    assert one.planned_counts() == [100, 18, 90]
    assert {task for row in one.first_rows() for task, _ in row} == {0, 1, 2}


def dynamic(**keys: Any) -> DynamicMixture:
    plain = mixture(**keys)
    return DynamicMixture(
        **{one.name: getattr(plain, one.name) for one in fields(Mixture)}, every=5
    )


def test_a_dynamic_mixture_goes_on_where_its_state_says() -> None:
    shares_ = [(0.7, 0.1, 0.2), (0.0, 0.5, 0.5), (1.0, 0.0, 0.0)]
    whole, rows = dynamic(), []
    for block, own in enumerate(shares_, start=1):
        rows += [whole.step(5 * (block - 1) + n) for n in range(5)]
        if block == 2:
            state = json.loads(json.dumps(whole.state()))
        whole.decide(block, own)
    rows += [whole.step(15 + n) for n in range(5)]
    again = dynamic()
    again.restore(state)
    again.decide(2, shares_[1])
    assert again.step(7) == rows[7]
    again.decide(3, shares_[2])
    assert [again.step(n) for n in range(10, 20)] == rows[10:20]
    with pytest.raises(LookupError):
        again.step(20)


def test_a_dynamic_mixture_fills_its_rows_and_repeats_nothing_early() -> None:
    one = dynamic(sizes=(400, 70, 900))
    one.decide(1, (0.6, 0.1, 0.3))
    assert all(len(one.step(n)[1]) == 4 for n in range(10))
    drawn = [place for n in range(10) for place in places(one.step(n)[1])]
    for task, size in enumerate((400, 70, 900)):
        own = [number for t, number in drawn if t == task]
        assert set(Counter(own).values()) <= {len(own) // size, -(-len(own) // size)}
    second = [task for n in range(5, 10) for task, _ in places(one.step(n)[1])]
    for task, share in enumerate((0.6, 0.1, 0.3)):
        assert abs(second.count(task) / len(second) - share) < 0.15
    used = sum(int(one.lengths[t][n]) for t, n in drawn)
    assert used > 0.85 * 10 * 4 * one.row_length
