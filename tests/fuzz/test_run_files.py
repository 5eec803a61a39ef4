"""Adapters and run folders with other bits: noticed, or without any meaning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mtl_lora_cli.adapters.files import CONFIG_FILE, TENSOR_FILE, read_alone, save_adapter
from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.evaluation.results import store, stored
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.runs.folder import RunFolder, save_json
from mtl_lora_cli.tasks.chosen import read_tasks
from mtl_lora_cli.tasks.registry import find_template
from mtl_lora_cli.tasks.task import Task

Fuzz = settings.get_profile("fuzz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder's adapter, tasks and an evaluation."""
    run = RunFolder(tmp_path_factory.mktemp("run"))
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(6, 5), "second": nn.Linear(5, 4)})
    config = configure(target_modules=("first", "second"), rank=2, gate="embedding")
    adapter = inject(model, config, ("sst2", "rte"))
    run.adapter.mkdir()
    save_adapter(adapter, run.adapter, {"name": "base", "revision": None, "fingerprint": "f" * 32})
    tasks = []
    for number, name in enumerate(("sst2", "rte")):
        _, path, template = find_template(name, None)
        text = path.read_text(encoding="utf-8")
        tasks.append(Task(name, number, name, text, template, Source(path="/nowhere")).to_json())
    save_json(run.tasks, {"tasks": tasks})
    store(
        run,
        {
            "task": "sst2",
            "model": "base",
            "examples": 2,
            "gold": [0, 1],
            "predicted": [1, 1],
            "metrics": {},
        },
    )
    return run.path


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return read_alone(folder / "adapter").tensors()


def changed(data: bytes, place: int, bit: int, kind: str) -> bytes:
    """One bit flipped, the end cut off, or a byte more."""
    place %= len(data)
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
    return data[:place] if kind == "cut" else data[:place] + bytes([bit]) + data[place:]


@settings(Fuzz)
@given(
    file=st.sampled_from([CONFIG_FILE, TENSOR_FILE]),
    place=st.integers(0, 10**6),
    bit=st.integers(0, 7),
    kind=st.sampled_from(["flip", "flip", "cut", "more"]),
)
def test_a_damaged_adapter_is_noticed(
    folder: Path, file: str, place: int, bit: int, kind: str
) -> None:
    path = folder / "adapter" / file
    good, before = path.read_bytes(), tensors(folder)
    path.write_bytes(changed(good, place, bit, kind))
    try:
        found = tensors(folder)
    except MtlLoraError as error:
        assert str(path) in str(error)
        return
    finally:
        path.write_bytes(good)
    assert found.keys() == before.keys()  # white space is all that may differ
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    if file == CONFIG_FILE:
        other = changed(good, place, bit, kind)
        assert json.loads(other) == json.loads(good)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**12) | st.text(max_size=8) | st.just("../../etc"),
    lambda below: st.lists(below, max_size=2) | st.dictionaries(st.text(max_size=5), below, max_size=2),
    max_leaves=4,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        below = list(value.items())
    elif isinstance(value, list):
        below = list(enumerate(value))
    return [(*path, key) for key, _ in below] + [
        place for key, one in below for place in places(one, (*path, key))
    ]


@settings(Fuzz)
@given(st.sampled_from(["tasks.json", "index.json", "result"]), st.data())
def test_any_value_in_a_run_s_json(folder: Path, name: str, data: st.DataObject) -> None:
    """Read, or one line; and no task's name leads out of a folder."""
    run = RunFolder(folder)
    evaluations = sorted(run.evaluations.glob("2*.json"))
    path = {"tasks.json": run.tasks, "index.json": run.evaluations / "index.json"}.get(
        name, evaluations[0]
    )
    good = path.read_bytes()
    content = json.loads(good)
    place = data.draw(st.sampled_from(places(content)))
    here = content
    for part in place[:-1]:
        here = here[part]
    here[place[-1]] = data.draw(JSON)
    path.write_text(json.dumps(content), encoding="utf-8")
    try:
        if name == "tasks.json":
            for task in read_tasks(run):
                assert "/" not in task.name
                assert not task.name.startswith(".")
        else:
            stored(run)
    except MtlLoraError as error:
        assert str(error).strip()
    finally:
        path.write_bytes(good)


def test_the_folder_is_as_it_was(folder: Path, tmp_path: Path) -> None:
    """What the cases above stand on."""
    shutil.copytree(folder, tmp_path / "copy")
    assert [task.name for task in read_tasks(RunFolder(folder))] == ["sst2", "rte"]
    assert len(stored(RunFolder(folder))) == 1
    assert tensors(folder)
