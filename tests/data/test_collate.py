"""From rows to a pass of the model: what is asked, of whom, and where."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtl_lora_cli.data.collate import supervised_tokens, training_batch
from mtl_lora_cli.data.encoded import EncodedSplit, encode_split
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.models.packed import PackedBatch
from mtl_lora_cli.tasks.rendering import Example

PAIRS = [
    [("Review: Fine.\nSentiment:", "positive"), ("Review: Oh no.\nSentiment:", "negative")],
    [("Once upon a time", "there was a girl."), ("Is it so?", "yes"), ("The dog", "ran 12 km")],
]
ROWS = [[(0, 1), (1, 0)], [(1, 2), (0, 0), (1, 1)]]
ORDER = [place for row in ROWS for place in row]


@pytest.fixture(scope="module")
def splits(stories_tokenizer: Any) -> list[EncodedSplit]:
    encoder = Encoder(stories_tokenizer, "plain")
    return [
        encode_split(
            [Example(prompt, answer, (), -1) for prompt, answer in pairs],
            ["f:1"] * len(pairs),
            encoder,
            task="t",
            limit=99,
            on_overflow="error",
        )
        for pairs in PAIRS
    ]


def segment_of(batch: PackedBatch, position: int) -> int:
    return next(i for i, (a, b) in enumerate(batch.segments.bounds) if a <= position < b)


def test_targets_are_exactly_the_answers_and_their_ends(
    splits: list[EncodedSplit], stories_tokenizer: Any
) -> None:
    batch = training_batch(ROWS, splits, loss_on="answer")
    asked: list[list[int]] = [[] for _ in ORDER]
    for owner, target in zip(batch.owner.tolist(), batch.targets.tolist(), strict=True):
        asked[segment_of(batch, int(batch.positions[owner]))].append(target)
    for (task, number), targets in zip(ORDER, asked, strict=True):
        assert targets[-1] == stories_tokenizer.eos_token_id
        assert stories_tokenizer.decode(targets[:-1]).strip() == PAIRS[task][number][1]


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_a_target_is_the_token_behind_its_position(
    splits: list[EncodedSplit], loss_on: str
) -> None:
    batch = training_batch(ROWS, splits, loss_on=loss_on)
    places = batch.positions[batch.owner]
    for place, target in zip(places.tolist(), batch.targets.tolist(), strict=True):
        segment = segment_of(batch, place)
        task, number = ORDER[segment]
        own = place - batch.segments.bounds[segment][0]
        assert splits[task].example(number)[own + 1] == target


def test_loss_on_all_asks_at_every_position(splits: list[EncodedSplit]) -> None:
    batch = training_batch(ROWS, splits, loss_on="all")
    expected = [place for a, b in batch.segments.bounds for place in range(a, b)]
    assert batch.positions.tolist() == expected


def test_the_number_of_supervised_tokens_is_the_splits(splits: list[EncodedSplit]) -> None:
    batch = training_batch(ROWS, splits, loss_on="answer")
    assert len(batch.targets) == sum(split.supervised for split in splits)


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_supervised_tokens_are_counted_without_a_batch(
    splits: list[EncodedSplit], loss_on: str
) -> None:
    batch = training_batch(ROWS, splits, loss_on=loss_on)
    owners = batch.task_ids[0, batch.positions[batch.owner]]
    counted = supervised_tokens(ROWS, splits, loss_on=loss_on)
    assert torch.equal(counted, torch.bincount(owners, minlength=len(splits)))


def test_tokens_tasks_and_positions_of_each_example(splits: list[EncodedSplit]) -> None:
    batch = training_batch(ROWS, splits, loss_on="answer")
    for (task, number), (start, end) in zip(ORDER, batch.segments.bounds, strict=True):
        read = splits[task].example(number)[:-1]  # the last token is predicted and never read
        assert batch.input_ids[0, start:end].tolist() == read.tolist()
        assert batch.task_ids[0, start:end].tolist() == [task] * (end - start)
        assert batch.position_ids[0, start:end].tolist() == list(range(end - start))
    assert batch.segments.bounds[-1][1] == batch.input_ids.shape[1]
    assert batch.segments.reach is None


def test_rows_together_are_rows_behind_each_other(splits: list[EncodedSplit]) -> None:
    together = training_batch(ROWS, splits, loss_on="answer")
    apart = [training_batch([row], splits, loss_on="answer") for row in ROWS]
    assert torch.equal(together.input_ids, torch.cat([b.input_ids for b in apart], dim=1))
    assert torch.equal(together.targets, torch.cat([b.targets for b in apart]))
