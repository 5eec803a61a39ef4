"""A run whose adapter is far from its start, without training, and folders of rows for it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_lora_cli.adapters.files import save_adapter
from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.predict import Predictor
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model
from mtl_lora_cli.recipe.load import dump_recipe
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.runs.folder import RunFolder, save_json
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.tasks.template import read_template

Finished = subprocess.CompletedProcess[str]

TEMPLATES = {
    "warm": 'prompt: "{{ word }} is a color?"\nlabel: label\nchoices: {1: "yes", 0: "no"}\n',
    "cold": 'prompt: "{{ word }}, cold?"\nlabel: label\nchoices: {7: "yes", 8: "maybe", 9: "no"}\n',
    "free": 'prompt: "Say {{ word }}"\nanswer: "{{ a }}"\ngenerate: {max_new_tokens: 3}\n',
}
WORDS = ("red", "blue", "dog", "cup", "tree", "old boat", "a king of birds", "ü", "teal")


@pytest.fixture(scope="session")
def run_folder(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return written_run(tmp_path_factory.mktemp("runs") / "mixed", small_model)


def written_run(
    path: Path, small_model: Path, change: Callable[[dict[str, torch.Tensor]], None] | None = None
) -> RunFolder:
    """Two tasks with choices and one with free answers, as files alone; its adapter is changed if that is wanted."""
    folder = RunFolder(path)
    folder.adapter.mkdir(parents=True)
    base = find_base_model(str(small_model))
    torch.manual_seed(0)
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    adapter = inject(model, configure(target_modules=("*_proj",)), tuple(TEMPLATES))
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.add_(0.05 * torch.randn_like(tensor))
        if change is not None:
            change(adapter.tensors())
    save_adapter(adapter, folder.adapter, base.identity())
    tasks = []
    for number, (name, text) in enumerate(TEMPLATES.items()):
        path = folder.path / f"{name}.yaml"
        path.write_text(f"description: {name}\n{text}", encoding="utf-8")
        written, template = path.read_text(encoding="utf-8"), read_template(path)
        tasks.append(Task(name, number, name, written, template, Source(path="nowhere")))
    named = [{"name": task.name, "template": task.name} for task in tasks]
    recipe = Recipe.model_validate({"base_model": str(small_model), "tasks": named})
    folder.recipe.write_text(dump_recipe(recipe))
    save_json(folder.tasks, {"tasks": [task.to_json() for task in tasks]})
    return folder


@pytest.fixture(scope="session")
def predictor(run_folder: RunFolder) -> Predictor:
    """The run, loaded, as `predict FILE` has it."""
    return Predictor(Run(run_folder))


def rows_of(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows of two tasks, mixed."""
    return [
        {"id": n, "word": f"{WORDS[n % len(WORDS)]} {n}", "of": ("warm", "cold")[n % 3 == 1]}
        for n in range(first, first + count)
    ]


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """`write_lines(name, rows)` writes JSON lines below `rows/`."""

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / "rows" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def call(
    run_folder: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Callable[..., Finished]:
    """`call(*arguments)` is `predict` with the run's name, in the folder of the rows, in this process."""
    monkeypatch.chdir(tmp_path)
    for name in ("TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY", "MTL_LORA_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # the command's frame sets them

    def run(*arguments: str) -> Finished:
        from mtl_lora_cli.cli.app import app

        capfd.readouterr()
        with pytest.raises(SystemExit) as leaving:
            app(["predict", "--run", str(run_folder.path), *arguments], prog_name="mtl-lora")
        code, said = int(leaving.value.code or 0), capfd.readouterr()
        return Finished(list(arguments), code, said.out, said.err)

    return run
