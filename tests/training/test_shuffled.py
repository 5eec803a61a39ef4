"""The control in which task ids say nothing of tasks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mtl_lora_cli.training.drawn import Draw
from mtl_lora_cli.training.prepared import Prepared

pytestmark = pytest.mark.slow


def test_ids_are_permuted_over_examples_and_nothing_else_changes(prepared: Prepared) -> None:
    settings = prepared.recipe.training
    plain, shuffled, other = (
        Draw(prepared.data, settings.model_copy(update=changed))
        for changed in ({}, {"shuffled_tasks": True}, {"shuffled_tasks": True, "seed": 1})
    )
    given: dict[tuple[int, int], int] = {}
    differ = 0
    for number in range(prepared.total_steps):
        one, two = plain(number), shuffled(number)
        assert torch.equal(one.supervised, two.supervised)
        for left, right, own, same in zip(
            one.batches, two.batches, one.owners, two.owners, strict=True
        ):
            assert torch.equal(own, same)
            assert torch.equal(replace(right, task_ids=left.task_ids).owners, own)
            assert torch.equal(left.input_ids, right.input_ids)
        for batch, places in zip(two.batches, two.places, strict=True):
            lengths = [end - start for start, end in batch.segments.bounds]
            ids = batch.task_ids.view(-1).split(lengths)
            for place, own in zip(places, ids, strict=True):
                assert len(set(own.tolist())) == 1  # an example has one id
                assert given.setdefault(place, int(own[0])) == int(own[0])  # the same in each epoch
        differ += sum(
            not torch.equal(a.task_ids, b.task_ids)
            for a, b in zip(two.batches, other(number).batches, strict=True)
        )
    moved = sum(task != found for (task, _), found in given.items())
    assert moved > len(given) / 2  # of four equal tasks three quarters
    assert differ > 0


def test_each_id_is_as_frequent_as_before(prepared: Prepared) -> None:
    from mtl_lora_cli.training.shuffled import ShuffledTasks

    lengths = prepared.data.dataset("answer").lengths
    found = torch.cat([torch.from_numpy(own) for own in ShuffledTasks(lengths, 3)._ids])
    assert torch.bincount(found).tolist() == [len(own) for own in lengths]
