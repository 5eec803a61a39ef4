"""A run that learns from a stream, stopped and resumed, is the run that never stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.checkpoints import newest_checkpoint
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import Prepared
from mtl_lora_cli.training.run import resume, start

from .conftest import FOLDERS
from .test_resume import same

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(autouse=True)
def recipe(
    small_data: Path, stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Of a stream in windows of a few rows and of a task that is none."""
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    one, two = list(FOLDERS)[:2]
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"base_model: {stories_folder}\n"
        "adapter: {rank: 4, dropout: 0.1}\n"
        "tasks:\n"
        f"- {{name: {one}, template: {one}, source: {{path: {small_data / one}, stream: true, buffer: 6}}}}\n"
        f"- {{name: {two}, template: {two}, source: {{path: {small_data / two}}}, max_examples: 5}}\n"
        "training: {max_steps: 6, row_length: 128, rows_per_step: 2, on_overflow: truncate_prompt}\n"
    )
    return path


@pytest.fixture
def prepared(recipe: Path) -> Prepared:
    return prepare(load_recipe(recipe))


def test_a_stream_goes_on_where_it_stood(
    small: Callable[..., Any], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small(checkpoint_every=None).train()
    epochs = {event["epoch"] for event in whole.events if event["event"] == "step"}
    assert len(epochs) > 1
    stopped = small(checkpoint_every=None).train(stop_after=4)
    monkeypatch.setenv("MTL_LORA_CACHE", str(recipe.parent / "another"))  # nothing is left of it
    again = small(checkpoint_every=None, folder=stopped.run.path)
    torch.manual_seed(999)
    again.trainer.resume(newest_checkpoint(stopped.run.checkpoints))
    same(whole, again.train())


def test_a_bad_row_of_a_later_window_costs_nothing_that_was_learned(
    recipe: Path, small_data: Path, tmp_path: Path
) -> None:
    name = next(iter(FOLDERS))
    own = tmp_path / "own"
    shutil.copytree(small_data / name, own)
    rows = (own / "train.jsonl").read_text().splitlines()
    rows[9] = "{}"  # of window 1
    (own / "train.jsonl").write_text("".join(f"{row}\n" for row in rows))
    recipe.write_text(recipe.read_text().replace(str(small_data / name), str(own)))
    run = RunFolder(tmp_path / "run")
    with pytest.raises(UsageError) as raised:
        start(prepare(load_recipe(recipe)), run.path)
    (line,) = raised.value.lines
    assert (
        "train.jsonl:10: " in line
        and "broken_rows: drop in the source leaves such rows out" in line
    )
    last = newest_checkpoint(run.checkpoints)
    assert last is not None and f"{last.name} is saved: go on with mtl-lora train --resume" in line
    with pytest.raises(UsageError, match="differs"):
        resume(run, None, ["tasks.0.source.buffer=7"])
    resume(run, None, ["tasks.0.source.broken_rows=drop"])
    steps = [event["step"] for event in run.events() if event["event"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert run.adapter.is_dir()
