"""One seed, one result: to the last bit, however the work is divided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.engine.saved import Keep


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    assert list(one) == list(two)
    return all(torch.equal(one[name], two[name]) for name in one)


def test_two_runs_with_one_seed_give_one_adapter(small: Callable[..., Any]) -> None:
    first, second = small().train(), small().train()
    assert equal(first.tensors, second.tensors)
    assert first.losses == second.losses


def test_another_seed_gives_another_adapter(small: Callable[..., Any]) -> None:
    assert not equal(small(steps=1).tensors, small(steps=1, seed=1).tensors)


def test_training_changes_every_part(small: Callable[..., Any]) -> None:
    run = small(steps=3)
    before = run.tensors
    after = run.train().tensors
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_training_leaves_the_base_model_alone(small: Callable[..., Any]) -> None:
    run = small(steps=2, learning_rate=0.1)
    trained = {id(tensor) for tensor in run.trainer.adapter.tensors().values()}
    frozen = {
        name: (parameter, parameter.detach().clone())
        for name, parameter in run.trainer.host.named_parameters()
        if id(parameter) not in trained
    }
    run.train()
    assert len(frozen) > 40
    assert all(torch.equal(now, before) for now, before in frozen.values())


def test_recomputation_gives_the_same_adapter(small: Callable[..., Any]) -> None:
    kept = small(steps=3).train()
    recomputed = small(steps=3, gradient_checkpointing=True)
    nothing = Keep(attended=False, qkv=False, gate_up=False)
    assert set(recomputed.trainer.host.keep) == {nothing}
    assert equal(kept.tensors, recomputed.train().tensors)
