"""Real lengths, every example once, and a step counts its real tokens."""

from __future__ import annotations

import pytest
import torch

from mtl_lora_cli.bench.peft_baseline import padded_batches
from mtl_lora_cli.bench.yardstick import Yardstick, lengths, require_fitting, supervised_share
from mtl_lora_cli.errors import UsageError


def test_the_lengths() -> None:
    every = lengths()
    assert len(every) == 3150
    assert [tuple(one) for one in every[:3]] == [(2, 132, 7), (3, 104, 7), (0, 63, 6)]
    assert max(one.tokens for one in every) == 469
    assert sum(one.tokens for one in every) / len(every) == pytest.approx(104, abs=0.1)
    assert {one.task for one in every} == set(range(7))
    assert supervised_share() == pytest.approx(21_600 / 327_456)


@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_examples_have_the_lengths_of_the_file(tasks: int) -> None:
    yardstick = Yardstick.build(vocabulary=50, tasks=tasks, seed=1)
    assert len(yardstick.splits) == tasks
    for one, (task, number) in zip(lengths(), yardstick.places, strict=True):
        split = yardstick.splits[task]
        assert task == one.task % tasks
        assert len(split.example(number)) == one.tokens
        assert split.prompt_lengths[number] == one.prompt
    assert all(
        0 <= split.tokens.min() <= split.tokens.max() < 50
        for split in yardstick.splits
        if split.rows
    )


def _tokens(yardstick: Yardstick, row: list[tuple[int, int]]) -> int:
    return sum(len(yardstick.splits[task].example(number)) for task, number in row)


def test_rows_hold_every_example_once_but_for_the_left_overs() -> None:
    yardstick = Yardstick.build(vocabulary=50, tasks=8, seed=0)
    rows = yardstick.rows(8192, seed=0)
    held = [place for row in rows for place in row]
    assert len(held) == len(set(held))
    assert set(held) <= set(yardstick.places)
    assert len(rows) == 39
    counts = [_tokens(yardstick, row) - len(row) for row in rows]  # last tokens take no position
    assert min(counts) > 0.99 * 8192
    assert max(counts) <= 8192
    left = set(yardstick.places) - set(held)
    assert 0 < _tokens(yardstick, list(left)) < 0.9 * 8192
    assert rows != yardstick.rows(8192, seed=1)
    assert rows == yardstick.rows(8192, seed=0)


def test_all_in_one_row_that_is_not_full() -> None:
    yardstick = Yardstick.build(vocabulary=50, tasks=8, seed=0)
    (row,) = yardstick.rows(1_000_000, seed=0)
    assert sorted(row) == sorted(yardstick.places)


def test_steps_count_real_and_supervised_tokens() -> None:
    yardstick = Yardstick.build(vocabulary=50, tasks=8, seed=0)
    rows = yardstick.rows(8192, seed=0)
    steps = yardstick.steps(40, row_length=8192, rows_per_step=2, rows_per_pass=1, seed=0)
    assert len(steps) == 40
    for number, step in enumerate(steps[:39]):
        mine = [rows[(2 * number + one) % len(rows)] for one in range(2)]
        assert step.tokens == sum(_tokens(yardstick, row) for row in mine)
        assert step.supervised == sum(len(batch.owner) for batch in step.batches)
        tasks = torch.cat([batch.task_ids.view(-1) for batch in step.batches])
        assert {task for row in mine for task, _ in row} <= set(tasks.tolist())
    assert [len(step.batches) for step in steps] == [2] * 40
    assert steps[39].tokens == steps[0].tokens, "after the last row the first comes again"
    together = yardstick.steps(1, row_length=8192, rows_per_step=3, rows_per_pass=2, seed=0)[0]
    assert len(together.batches) == 2


def test_a_row_must_hold_the_longest() -> None:
    require_fitting(469)
    with pytest.raises(UsageError, match="the longest example has 469 tokens"):
        require_fitting(468)


def test_padded_batches() -> None:
    """The file's order, real tokens counted, labels on the answers alone."""
    yardstick = Yardstick.build(vocabulary=50, tasks=8, seed=0)
    batches = padded_batches(yardstick, size=4, count=3)
    for number, batch in enumerate(batches):
        mine = lengths()[4 * number : 4 * number + 4]
        assert batch.input_ids.shape == (4, max(one.tokens for one in mine))
        assert batch.tokens == int(batch.attention_mask.sum()) == sum(one.tokens for one in mine)
        assert int((batch.labels != -100).sum()) == sum(one.answer for one in mine)
        counted = batch.labels != -100
        assert torch.equal(batch.labels[counted], batch.input_ids[counted])
        assert bool((batch.attention_mask[counted] == 1).all())
