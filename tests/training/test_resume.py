"""A run that was stopped and resumed is the run that never stopped, to the last bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_lora_cli.adapters.files import read_tensors
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.runs.folder import find_run
from mtl_lora_cli.training.checkpoints import newest_checkpoint
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import Prepared
from mtl_lora_cli.training.run import resume, start

from ..often import often

pytestmark = pytest.mark.slow


def same(one: Any, two: Any) -> None:
    assert one.losses == two.losses
    ours, theirs = one.tensors, two.tensors
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("step", often([1, 3, 4], [3]))
def test_ctrl_c_and_resume(small: Callable[..., Any], step: int) -> None:
    whole = small().train()
    stopped = small(checkpoint_every=None).train(stop_after=step)
    checkpoint = newest_checkpoint(stopped.run.checkpoints)
    assert checkpoint is not None
    assert checkpoint.name == f"step-{step:06d}"
    again = small(checkpoint_every=None, folder=stopped.run.path)
    torch.manual_seed(999)  # nothing may depend on what happened before
    again.trainer.resume(checkpoint)
    same(whole, again.train())


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(small: Callable[..., Any]) -> None:
    whole = small().train()
    killed = small().train()
    for name in ("step-000004", "step-000006"):
        shutil.rmtree(killed.run.checkpoints / name)
    with killed.run.metrics.open("a") as file:
        file.write('{"event": "step", "step": 7, "lo')  # torn by the kill
    again = small(folder=killed.run.path)
    checkpoint = newest_checkpoint(killed.run.checkpoints)
    assert checkpoint is not None
    again.trainer.resume(checkpoint)
    assert again.trainer.position.step == 2
    same(whole, again.train())
    assert again.trainer.position.tokens == whole.trainer.position.tokens


def test_a_run_goes_on_on_the_engine_that_it_began_on(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a version that knew less picked the plain one: sums of the other are formed in another order."""
    short = ["training.max_steps=2", "training.checkpoint_every=1", "training.rows_per_step=2"]
    run = start(prepare(load_recipe(recipe_file, [*short, "engine=plain"])), tmp_path / "early")
    finished = read_tensors(run.require_adapter())
    about = json.loads(run.environment.read_text())
    about["engine"]["why_not_fused"] = "ranks that differ"
    run.environment.write_text(json.dumps(about))
    run.recipe.write_text(run.recipe.read_text().replace("engine: plain", "engine: auto"))
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "step-000002")
    resume(run, None, [])
    assert (
        "began on the plain engine (ranks that differ), and goes on there"
        in capsys.readouterr().err
    )
    again = read_tensors(run.require_adapter())
    assert all(torch.equal(finished[name], again[name]) for name in finished)


def test_time_and_tokens_go_on_counting(small: Callable[..., Any]) -> None:
    stopped = small().train(stop_after=4)
    again = small(folder=stopped.run.path)
    again.trainer.resume(newest_checkpoint(stopped.run.checkpoints))
    before = again.trainer.position
    again.train()
    after = again.trainer.position
    assert after.seconds > before.seconds > 0
    assert after.tokens == sum(event["tokens"] for event in again.events)


def test_signals_are_given_back(small: Callable[..., Any]) -> None:
    import signal

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    small().train(stop_after=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_whole_run_is_started_and_resumed_by_its_folder(
    recipe_file: Path, prepared: Prepared, tmp_path: Path
) -> None:
    run = start(prepared, tmp_path / "first")
    finished = read_tensors(run.require_adapter())
    with pytest.raises(UsageError, match="run 'first' is finished"):
        resume(run, None, [])
    with pytest.raises(UsageError, match=r"run folder .*first exists"):
        start(prepared, tmp_path / "first")

    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "step-000006")
    found = find_run(None, tmp_path)
    with pytest.raises(UsageError, match=r"training\.seed: 0 → 1"):
        resume(found, recipe_file, ["training.seed=1"])
    assert not run.adapter.exists()
    resume(found, recipe_file, [])
    again = read_tensors(run.require_adapter())
    assert all(torch.equal(finished[name], again[name]) for name in finished)
    assert [event["step"] for event in run.events()] == [1, 2, 3, 4, 5, 6]
