"""A run with `base_compute: fp8`: what it says, and that it goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mtl_lora_cli.adapters.files import read_tensors
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.run import resume, start

pytestmark = pytest.mark.slow

FP8 = [
    "base_compute=fp8",
    "training.max_steps=2",
    "training.checkpoint_every=1",
    "training.validation={every: 2, examples: 2}",
]


def begun(recipe_file: Path, folder: Path) -> RunFolder:
    return start(prepare(load_recipe(recipe_file, FP8)), folder)


def test_a_run_in_eight_bits_says_what_they_cost_and_lets_go_of_the_weights(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Looks at held-out examples do without them."""
    run = begun(recipe_file, tmp_path / "first")
    said = capsys.readouterr().err
    assert said.count("log-probabilities differ from exact products by") == 1
    assert "stay in memory" not in said
    tensors = read_tensors(run.require_adapter())
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    looks = [event["loss"] for event in run.events() if event["event"] == "validation"]
    assert looks and all(loss > 0 for look in looks for loss in look.values() if loss)


@pytest.mark.long
def test_it_is_resumed_to_the_same_bits(recipe_file: Path, tmp_path: Path) -> None:
    run = begun(recipe_file, tmp_path / "first")
    finished = read_tensors(run.require_adapter())
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "step-000002")
    resume(run, None, [])
    again = read_tensors(run.require_adapter())
    assert all(torch.equal(finished[name], again[name]) for name in finished)
