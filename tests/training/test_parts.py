"""Each part of the adapter learns at its own rate and with its own decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mtl_lora_cli.adapters.methods import base as methods
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.training import Parts, PartSettings
from mtl_lora_cli.training.checkpoints import newest_checkpoint
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.run import start
from mtl_lora_cli.training.schedule import learning_rate_factor

pytestmark = pytest.mark.slow

EMBEDDED = configure(rank=4, gate="embedding")
PARTS = ("down", "up", "transform", "gate", "embedding")


def part_of(name: str) -> str:
    return EMBEDDED.role(name).part


def parts_of(names: Iterable[str]) -> set[str]:
    return {part_of(name) for name in names}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The parts all of whose tensors have changed; a part that changed in places is a failure."""
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not parts_of(changed) & parts_of(before.keys() - changed)
    return parts_of(changed)


def test_every_role_belongs_to_a_part() -> None:
    known = set(get_args(methods.Part))
    assert known == {*PARTS, "whole", "decoder"} == set(Parts.model_fields)
    assert {role.part for role in EMBEDDED.all_roles()} == set(PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_a_rate_of_zero_freezes_that_part_and_no_other(
    small: Callable[..., Any], part: str
) -> None:
    run = small(steps=3, adapter=EMBEDDED, parts=Parts(**{part: PartSettings(learning_rate=0.0)}))
    with torch.no_grad():  # with every B at zero nothing else gets a gradient
        for layer in run.trainer.adapter.layers.values():
            layer.lora_B.normal_(std=0.1)
    before = run.tensors
    assert moved(before, run.train().tensors) == set(PARTS) - {part}


@pytest.mark.parametrize("part", PARTS)
def test_a_parts_decay_reaches_that_part_and_no_other(small: Callable[..., Any], part: str) -> None:
    """Plain AdamW in the first step: decay takes rate · decay · value beside the same update."""
    settings = {"steps": 1, "adapter": EMBEDDED, "warmup": 0.0, "learning_rate": 0.01}
    start_from = small(**settings).tensors
    plain = small(**settings).train().tensors
    decayed = (
        small(**settings, parts=Parts(**{part: PartSettings(weight_decay=0.5)})).train().tensors
    )
    for name, value in start_from.items():
        expected = plain[name] - (0.01 * 0.5 * value if part_of(name) == part else 0.0)
        assert torch.allclose(decayed[name], expected, rtol=0, atol=1e-6), name


def test_each_parts_rate_follows_the_schedule(small: Callable[..., Any]) -> None:
    parts = Parts(
        down=PartSettings(learning_rate=1e-4),
        up=PartSettings(learning_rate=5e-4, weight_decay=0.01),
    )
    run = small(steps=3, learning_rate=3e-4, warmup=0.0, schedule="linear", parts=parts)
    names = {id(tensor): name for name, tensor in run.trainer.adapter.tensors().items()}
    seen: list[dict[str, float]] = []

    def look(step: int) -> None:
        seen.append(
            {
                run.trainer.adapter.role(names[id(tensor)]).part: group["lr"]
                for group in run.trainer.stepper.update.optimizer.param_groups
                for tensor in group["params"]
            }
        )

    run.train(after=look)
    peaks = {"down": 1e-4, "up": 5e-4, "transform": 3e-4, "gate": 3e-4}
    factors = [learning_rate_factor(step, 3, 0.0, "linear") for step in range(3)]
    assert seen == [{name: peak * f for name, peak in peaks.items()} for f in factors]
    assert [event["learning_rate"] for event in run.events] == [3e-4 * f for f in factors]


def test_without_parts_there_is_one_group(small: Callable[..., Any]) -> None:
    """One kernel on a card, and the very numbers of a run that never heard of parts."""
    assert len(small().trainer.stepper.update.optimizer.param_groups) == 1
    same = Parts(down=PartSettings(learning_rate=3e-3), gate=PartSettings(weight_decay=0.0))
    assert len(small(parts=same).trainer.stepper.update.optimizer.param_groups) == 1


def test_a_run_with_parts_is_resumed_to_the_last_bit(small: Callable[..., Any]) -> None:
    parts = Parts(
        down=PartSettings(learning_rate=1e-3),
        up=PartSettings(learning_rate=5e-3, weight_decay=0.1),
        gate=PartSettings(learning_rate=1e-2),
    )
    whole = small(parts=parts).train()
    stopped = small(parts=parts, checkpoint_every=None).train(stop_after=3)
    again = small(parts=parts, checkpoint_every=None, folder=stopped.run.path)
    again.trainer.resume(newest_checkpoint(stopped.run.checkpoints))
    again.train()
    assert whole.losses == again.losses
    ours, theirs = whole.tensors, again.tensors
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["adapter.method=lora", "training.parts.gate.learning_rate=1e-3"],
            "training.parts: this adapter (method lora) has no gate; its parts: down, up",
        ),
        (
            ["training.parts.embedding.weight_decay=0.1"],
            "training.parts: this adapter (method mtl-lora) has no embedding; "
            "its parts: down, up, transform, gate",
        ),
    ],
)
def test_a_part_that_is_not_there_is_an_error_before_anything_is_written(
    recipe_file: Path, tmp_path: Path, overrides: list[str], line: str
) -> None:
    prepared = prepare(load_recipe(recipe_file, overrides))
    with pytest.raises(UsageError) as caught:
        start(prepared, tmp_path / "run")
    assert caught.value.lines == [line]
    assert not (tmp_path / "run").exists()
