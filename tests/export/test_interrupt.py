"""A merge that is killed leaves nothing that looks finished, and the next one clears away its rest.

The merges are forks of a process that has loaded the libraries and nothing else, so that a merge is
killed and not the loading before it.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.export.order import Options
from mtl_lora_cli.export.write import write_tasks
from mtl_lora_cli.models.base import find_base_model

KILLS = 10
SHARDS = 3

Start = Callable[[Path], BaseProcess]


@pytest.fixture(scope="module")
def large(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run on its base model with 60 MB of other tensors, so that writing takes a while."""
    folder = tmp_path_factory.mktemp("large")
    for file in run.base.folder.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(run.base.folder / "model.safetensors")
    weight_map = {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::SHARDS]}
        part[f"other.{number}"] = torch.rand(5_000_000)
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return run.but(base=find_base_model(str(folder)))


@pytest.fixture(scope="module")
def start(large: Run) -> Start:
    """`start(folder)` begins to merge into it, in another process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["mtl_lora_cli.export.write", "transformers.models.llama.modeling_llama"]
    )

    def begin(folder: Path, checked: bool = False) -> BaseProcess:
        bare = Run(large.folder).but(base=large.base)  # what a run has read need not be picklable
        targets, options = [(large.tasks[0], folder)], Options(checked=checked, limit=4)
        process = context.Process(target=write_tasks, args=("merged", bare, targets, options))
        process.start()
        return process

    return begin


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def half_written(beside: Path) -> bool:
    """Whether a folder that is not yet whole holds something."""
    return any(list(path.iterdir()) for path in beside.iterdir() if path.name.startswith(".out."))


def test_a_killed_merge_is_never_taken_for_a_finished_one(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    durations = []
    for _ in range(2):  # the first one starts the process that the others are forks of
        began = time.monotonic()
        merging = start(tmp_path / f"whole-{len(durations)}")
        merging.join()
        assert merging.exitcode == 0
        durations.append(time.monotonic() - began)
    expected = contents(tmp_path / "whole-1")
    assert len(expected) == SHARDS + 6
    draw = random.Random(7)
    halves = 0
    for number in range(KILLS):
        merging = start(out)
        if (
            number % 2
        ):  # while it writes: before that, it reads and looks for names most of the time
            while merging.is_alive() and not half_written(tmp_path):
                merging.join(0.001)
            merging.join(draw.random() * 0.02)
        else:
            merging.join((number + draw.random()) / KILLS * durations[-1])
        merging.kill()
        merging.join()
        rest = [path for path in tmp_path.iterdir() if path.name.startswith(".out.")]
        assert len(rest) <= 1, "what the one before left is cleared away"
        if out.exists():  # it was faster than the one that was timed
            assert contents(out) == expected
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
        else:
            halves += any(list(folder.iterdir()) for folder in rest)
    assert halves >= 3, "kills that met a folder half written"
    merging = start(out)
    merging.join()
    assert merging.exitcode == 0
    assert contents(out) == expected
    assert not list(tmp_path.glob(".out.*"))


def test_a_merge_killed_while_it_is_checked_is_none(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merging = start(out, checked=True)
    deadline = time.monotonic() + 60
    while not list(
        tmp_path.glob(".out.*.partial/tokenizer.json")
    ):  # the last file before the check
        assert time.monotonic() < deadline
        time.sleep(0.01)
    merging.join(0.5)
    assert merging.is_alive()
    merging.kill()
    merging.join()
    assert not out.exists()
    (rest,) = tmp_path.iterdir()
    assert rest.suffix == ".partial"
    assert not (rest / "README.md").exists()
