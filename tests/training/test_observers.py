"""Looking changes nothing: not the adapter, not the steps' lines, not what is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.recipe.training import Diagnose, ValidationSettings
from mtl_lora_cli.training.checkpoints import newest_checkpoint
from mtl_lora_cli.training.step import Stepper

from ..often import often

pytestmark = pytest.mark.slow

LOOKING = {"diagnose": Diagnose(every=2), "validation": ValidationSettings(every=3, examples=5)}
TIMES = ("seconds", "tokens_per_second")


def lines(run: Any) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock says."""
    return [{k: v for k, v in event.items() if k not in TIMES} for event in run.events]


def steps_of(run: Any) -> list[dict[str, Any]]:
    return [event for event in lines(run) if event["event"] == "step"]


def same_adapter(one: Any, two: Any) -> bool:
    ours, theirs = one.tensors, two.tensors
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_that_is_looked_at_is_the_run_that_is_not(small: Callable[..., Any]) -> None:
    """The recipe has dropout, so one random number more or less would show."""
    alone, seen = small().train(), small(**LOOKING).train()
    assert same_adapter(alone, seen)
    assert steps_of(alone) == steps_of(seen) == lines(alone)
    assert [(event["event"], event["step"]) for event in seen.events] == [
        ("step", 1),
        ("gradients", 2),
        ("step", 2),
        ("step", 3),
        ("validation", 3),
        ("gradients", 4),
        ("step", 4),
        ("step", 5),
        ("gradients", 6),
        ("step", 6),
        ("validation", 6),
    ]


@pytest.mark.parametrize("training", [{"gradient_checkpointing": True}, {"rows_per_pass": 3}])
def test_however_the_passes_are_made(small: Callable[..., Any], training: dict[str, Any]) -> None:
    alone, seen = small(**training).train(), small(**training, **LOOKING).train()
    assert same_adapter(alone, seen)


def test_looking_leaves_modes_gradients_and_random_state(small: Callable[..., Any]) -> None:
    trainer = small(**LOOKING).trainer
    trainer.host.train()
    trainer.stepper.accumulate(trainer.stepper.prepare(0))
    gradients = {name: t.grad.clone() for name, t in trainer.adapter.tensors().items()}
    state = torch.get_rng_state()
    modes = [module.training for module in trainer.host.modules()]
    assert any(modes) and not all(modes)  # what is frozen stays in evaluation mode
    for observer in trainer._observers:
        observer.look(1)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in trainer.host.modules()] == modes
    for name, tensor in trainer.adapter.tensors().items():
        assert torch.equal(tensor.grad, gradients[name])


@pytest.mark.parametrize("stop", often([2, 3, 5], [3]))
def test_a_resumed_run_has_the_same_lines(small: Callable[..., Any], stop: int) -> None:
    whole = small(**LOOKING).train()
    stopped = small(**LOOKING, checkpoint_every=None).train(stop_after=stop)
    again = small(**LOOKING, checkpoint_every=None, folder=stopped.run.path)
    again.trainer.resume(newest_checkpoint(stopped.run.checkpoints))
    again.train()
    assert lines(again) == lines(whole)
    assert same_adapter(again, whole)


def test_where_steps_run_ahead_each_is_finished_before_anyone_looks(
    small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card's order of things, on the CPU: a step is written down when the next one is running."""
    monkeypatch.setattr(Stepper, "mark", lambda self: None)
    whole, ahead = small(**LOOKING).train(), small(**LOOKING, checkpoint_every=None)
    ahead.trainer.stepper.runs_ahead = True
    ahead.train()
    assert lines(ahead) == lines(whole)
    assert ahead.trainer.position.metrics_bytes == ahead.run.metrics.stat().st_size


def test_a_poisoned_weight_leaves_no_line_that_is_not_json(small: Callable[..., Any]) -> None:
    run = small(**LOOKING)

    def poison(step: int) -> None:
        if step == 3:
            with torch.no_grad():
                next(iter(run.trainer.adapter.layers.values())).lora_A[0, 0, 0] = float("nan")

    with pytest.raises(MtlLoraError, match="no longer a finite number at step 4"):
        run.train(after=poison)
    json.dumps(run.events, allow_nan=False)
    assert [event["step"] for event in run.events if event["event"] == "gradients"] == [2]
