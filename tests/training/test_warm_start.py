"""`train --from`: a run that begins at a finished adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mtl_lora_cli.adapters.files import read_adapter_file, read_tensors
from mtl_lora_cli.data.mixture import subset
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.opened import open_run
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.run import resume, start
from mtl_lora_cli.training.warm_start import ROWS, load_beginning

pytestmark = pytest.mark.slow

TINY = ("training.learning_rate=1e-12", "training.warmup=0")


@pytest.fixture(scope="module")
def first(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of four tasks that are far from their start."""
    overrides = ["adapter.dropout=0", "training.parts={transform: {learning_rate: 0.1}}"]
    folder = tmp_path_factory.mktemp("first")
    return start(prepare(load_recipe(recipe_file, overrides)), folder / "first")


def recipe(folder: Path, small_data: Path, tasks: dict[str, str], **training: Any) -> Path:
    """Of tasks by the templates and data of others; the rest is the run's."""
    entries = [
        {"name": name, "template": of, "source": str(small_data / of)} for name, of in tasks.items()
    ]
    settings = {
        "max_steps": 4, "row_length": 128, "rows_per_step": 2, "on_overflow": "truncate_prompt",
        "checkpoint_every": 2, **training,
    }  # fmt: skip
    path = folder / "more.yaml"
    path.write_text(yaml.safe_dump({"tasks": entries, "training": settings}))
    return path


def begun(first: RunFolder, path: Path, folder: Path, *overrides: str) -> RunFolder:
    loaded = load_beginning(first, path, overrides)
    return start(prepare(loaded, begins=first), folder)


def test_known_tasks_begin_at_their_own_parts_in_any_order(
    first: RunFolder, small_data: Path, tmp_path: Path
) -> None:
    """With a rate of nothing it is the same adapter, its tasks in another order."""
    path = recipe(tmp_path, small_data, {"cola": "cola", "sst2": "sst2"})
    run = begun(first, path, tmp_path / "second", *TINY)
    file, found = read_adapter_file(first.adapter), read_tensors(run.adapter)
    places = [file.tasks.index(name) for name in ("cola", "sst2")]
    for name, before in file.tensors.items():
        of_tasks = file.config.role(name).per_task
        torch.testing.assert_close(
            found[name], before[places] if of_tasks else before, atol=1e-8, rtol=0
        )
    stored = json.loads(run.tasks.read_text())
    assert stored["began_at"]["run"] == "first"
    starts = json.loads((run.begins.path / "starts.json").read_text())["tasks"]
    assert [one["at"] for one in starts.values()] == ["cola", "sst2"]


def test_a_new_task_begins_at_the_nearest_by_loss(
    first: RunFolder, small_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nearest by the finished run's own losses on the same rows, an example at a time."""
    path = recipe(tmp_path, small_data, {"again": "rte", "sst2": "sst2"})
    run = begun(first, path, tmp_path / "second", *TINY)
    starts = json.loads((run.begins.path / "starts.json").read_text())["tasks"]
    assert starts["sst2"] == {
        "task": "sst2",
        "at": "sst2",
        "loss": None,
        "next_at": None,
        "next_loss": None,
    }
    opened = open_run(first)
    prepared = prepare(load_beginning(first, path))
    split = prepared.data.splits[0]
    losses = {}
    for task in opened.tasks:
        total, units = 0.0, 0
        for number in subset(len(split), ROWS, 0, "again"):
            tokens = torch.from_numpy(split.example(number).astype("int64"))
            learned = split.learned(number, "answer")
            with torch.no_grad(), opened.packed.over_rows(task.id) as model:
                found = model(input_ids=tokens[None, :-1]).logits.float().log_softmax(-1)[0]
            total -= float(found[learned - 1, tokens[learned]].sum())
            units += len(learned)
        losses[task.name] = total / units
    order = sorted(losses, key=losses.__getitem__)
    again = starts["again"]
    assert [again["at"], again["next_at"]] == order[:2]
    assert again["loss"] == pytest.approx(losses[order[0]], rel=1e-4)
    assert f"again begins at {order[0]}, the nearest by 32 rows" in capfd.readouterr().err


def test_it_resumes_from_its_start_and_learns_what_has_a_rate(
    first: RunFolder, small_data: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, small_data, {"again": "rte"}, learning_rate=1e-2)
    frozen = "training.parts={down: {learning_rate: 0}, up: {learning_rate: 0}}"
    run = begun(first, path, tmp_path / "second", frozen)
    found, before = read_tensors(run.adapter), read_tensors(first.adapter)
    for name, tensor in before.items():
        if name.endswith(("lora_A", "lora_B")):
            assert torch.equal(found[name], tensor)
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints)  # killed before the first one
    resume(run, None, [])
    again = read_tensors(run.adapter)
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


def test_another_adapter_is_refused_in_one_line(
    first: RunFolder, small_data: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, small_data, {"again": "rte"})
    with pytest.raises(
        UsageError, match=r"of run 'first', at which it begins: adapter.rank: 4 → 8"
    ):
        load_beginning(first, path, ["adapter.rank=8"])
