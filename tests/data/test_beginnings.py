"""What examples share: how rows are planned by it, and how they are laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from mtl_lora_cli.data.beginnings import LEAST, Beginnings, packed_shared
from mtl_lora_cli.data.dynamic import DynamicMixture
from mtl_lora_cli.data.epoch_rows import Place
from mtl_lora_cli.data.laid import behind_each_other, in_trees
from mtl_lora_cli.data.mixture import Mixture
from mtl_lora_cli.data.packing import pack
from mtl_lora_cli.data.stages import Part, StagedMixture

DRAW = np.random.default_rng(0)
TRUNKS = [DRAW.integers(0, 9, 40).astype(np.int32) for _ in range(3)]


def drawn(task: int, count: int) -> list[np.ndarray]:
    """Examples that begin with more or less of their task's beginning, some of them twice."""
    found = []
    for _ in range(count):
        trunk = TRUNKS[task][: int(DRAW.integers(2, 41))]
        own = DRAW.integers(0, 9, int(DRAW.integers(1, 30)))
        found.append(np.concatenate([trunk, own]).astype(np.int32))
    return [*found, *found[:3], TRUNKS[task][:12]]


INPUTS = [drawn(0, 120), drawn(1, 60), drawn(2, 5)]
BEGINNINGS = tuple(Beginnings(own) for own in INPUTS)
LENGTHS = tuple(np.asarray([len(one) for one in own]) for own in INPUTS)
MIXTURE = Mixture(("a", "b", "c"), LENGTHS, 256, 2, beginnings=BEGINNINGS)


def pack_shared(
    places: Sequence[Place],
    lengths: Sequence[int],
    row_length: int,
    beginnings: Sequence[Beginnings],
) -> list[list[int]]:
    tasks, numbers = np.asarray(places).T
    members, starts = packed_shared(tasks, numbers, np.asarray(lengths), row_length, beginnings)
    return [members[a:b].tolist() for a, b in pairwise(starts.tolist())]


def nodes(examples: Sequence[tuple[int, np.ndarray]]) -> int:
    """Positions by the definition alone: different beginnings of all lengths, where at least LEAST are alike."""
    whole = [(task, tuple(tokens.tolist())) for task, tokens in examples]
    groups = dict[tuple[int, tuple[int, ...]], set[tuple[int, ...]]]()
    alone = 0
    for task, tokens in whole:
        if len(tokens) < LEAST:
            alone += len(tokens)  # they share nothing
        else:
            own = groups.setdefault((task, tokens[:LEAST]), set())
            own |= {tokens[:n] for n in range(1, len(tokens) + 1)}
    return alone + sum(map(len, groups.values()))


def of(row: Sequence[Place]) -> list[tuple[int, np.ndarray]]:
    return [(task, INPUTS[task][number]) for task, number in row]


def test_two_examples_have_in_common_what_they_begin_with() -> None:
    for own, beginnings in zip(INPUTS, BEGINNINGS, strict=True):
        for one in range(0, len(own), 7):
            for other in range(len(own)):
                a, b = sorted((beginnings.ranks[one], beginnings.ranks[other]))
                alike = [x == y for x, y in zip(own[one], own[other], strict=False)]
                right = alike.index(False) if False in alike else len(alike)
                assert beginnings.common(a, b) == right


def test_rows_are_planned_by_what_is_laid_out() -> None:
    rows = MIXTURE.epoch(0)
    assert sorted(place for row in rows for place in row) == [
        (task, number) for task, own in enumerate(INPUTS) for number in range(len(own))
    ]
    for row in rows:
        tasks, inputs = [task for task, _ in row], [tokens for _, tokens in of(row)]
        laid = in_trees([(tasks, inputs)])
        assert len(laid.tokens) == nodes(of(row)) <= 256
    assert len(rows) < 0.8 * len(replace(MIXTURE, beginnings=()).epoch(0))


def test_every_example_stands_on_its_path_and_sees_nothing_else() -> None:
    rows = MIXTURE.epoch(0)[:2]
    given = [([t for t, _ in row], [tokens for _, tokens in of(row)]) for row in rows]
    laid = in_trees(given)
    assert laid.reach is not None and sum(laid.lengths) == len(laid.tokens)
    segment = np.repeat(np.arange(len(laid.lengths)), laid.lengths)
    every = [example for row in rows for example in of(row)]
    for (task, tokens), path in zip(every, laid.paths, strict=True):
        assert (laid.tokens[path] == tokens).all() and (laid.tasks[path] == task).all()
        assert (laid.places[path] == np.arange(len(tokens))).all()
        for place in path.tolist():
            before = np.arange(place + 1)
            seen = before[(segment[before] == segment[place]) & (laid.reach[before] > place)]
            assert seen.tolist() == path[: len(seen)].tolist()


def test_long_examples_in_short_rows_take_no_more_rows_than_without() -> None:
    inputs = [DRAW.integers(0, 9, int(n)).astype(np.int32) for n in DRAW.integers(33, 64, 60)]
    places = [(0, number) for number in range(60)]
    lengths = [len(one) for one in inputs]
    found = pack_shared(places, lengths, 100, [Beginnings(inputs)])
    assert len(found) <= len(pack(lengths, 100))


def test_a_row_may_hold_one_example_as_often_as_it_is_drawn() -> None:
    one = [np.arange(50, dtype=np.int32)]
    assert pack_shared([(0, 0)] * 9, [50] * 9, 64, [Beginnings(one)]) == [list(range(9))]
    laid = in_trees([([0] * 3, one * 3)])
    assert laid.lengths == [50] and all((path == np.arange(50)).all() for path in laid.paths)


@pytest.mark.parametrize("tasks", [[0, 0], [0, 1]])
def test_less_than_is_worth_a_branch_is_not_shared(tasks: list[int]) -> None:
    alike = LEAST - 1 if tasks == [0, 0] else 20  # of two tasks nothing is
    pair = [np.asarray([*range(alike), own, own]) for own in (70, 80)]
    laid, plain = in_trees([(tasks, pair)]), behind_each_other(tasks, pair)
    assert laid.tokens.tolist() == plain.tokens.tolist() and laid.lengths == plain.lengths


def test_stages_and_dynamic_shares_plan_by_beginnings_too() -> None:
    given = {"names": MIXTURE.names, "lengths": LENGTHS, "row_length": 256, "rows_per_step": 2}
    parts = (Part((1,), 1.0), Part((0, 2), 1.0))
    staged = StagedMixture(**given, beginnings=BEGINNINGS, parts=parts)
    dynamic = DynamicMixture(**given, beginnings=BEGINNINGS, every=4)
    assert staged.steps_in(1.0) < StagedMixture(**given, parts=parts).steps_in(1.0)
    apart = DynamicMixture(**given, every=4)
    for mixture, steps in ((staged, staged.steps_in(1.0)), (dynamic, 8)):
        if isinstance(mixture, DynamicMixture):
            mixture.decide(1, [0.2, 0.3, 0.5])
        rows = [row for number in range(steps) for row in mixture.step(number)[1]]
        assert rows and all(nodes(of(row)) <= 256 for row in rows)
    held = [sum(len(row) for n in range(4) for row in one.step(n)[1]) for one in (dynamic, apart)]
    assert held[0] > 1.2 * held[1]


def test_planning_takes_every_example_once_whatever_is_open() -> None:
    """Many rows that stay open: the fullest is closed, and nothing is lost."""
    places = [(0, n) for n in range(len(INPUTS[0]))] * 3
    lengths = [int(LENGTHS[0][n]) for _, n in places]
    rows = pack_shared(places, lengths, 80, BEGINNINGS)
    assert sorted(n for row in rows for n in row) == list(range(len(places)))
    assert all(a < b for row in rows for a, b in pairwise(row))


def test_each_epoch_has_the_steps_that_its_own_order_fills() -> None:
    """Best-fit rows are as many in any order; these are not."""
    steps = [-(-len(MIXTURE.epoch(number)) // MIXTURE.rows_per_step) for number in range(6)]
    assert len(set(steps)) > 1
    assert MIXTURE.steps_in(6.0) == sum(steps)
    rows = [row for number in range(sum(steps)) for row in MIXTURE.step(number)[1]]
    assert rows == [row for number in range(6) for row in MIXTURE.epoch(number)]
