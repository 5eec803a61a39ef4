"""Finished runs on the tiny real model, and base models of other kinds with the same weights."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mtl_lora_cli.evaluation.opened import Run, open_run
from mtl_lora_cli.export.check import WrittenCheck, answers_of, questions_about
from mtl_lora_cli.export.comparison import Comparison
from mtl_lora_cli.export.formats import Reference
from mtl_lora_cli.export.order import Options, WrittenFolder
from mtl_lora_cli.export.questions import Questions, Scored
from mtl_lora_cli.export.write import write_tasks
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.run import start

# Task → where its data lie, its held-out split there, and held-out rows that are taken.
DATA = {
    "sst2": ("glue/sst2", "validation", 20),
    "home_depot": ("ads/home_depot", "test", 20),
    "cola": ("glue/cola", "validation", 100),
    "mrpc": ("glue/mrpc", "validation", 100),
}


def exported(kind: str, run: Run, task: Task, folder: Path, **options: Any) -> WrittenFolder:
    """One task in a format, as `merge` and `export` write it."""
    (written,) = write_tasks(kind, run, [(task, folder)], Options(**options))
    return written


def itself(questions: Questions) -> Scored:
    """What the run itself answers, as `eval` measures it."""
    return answers_of(Reference("the run"), questions)


@pytest.fixture(scope="session")
def small_data(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small-data")
    for name, (folder, held_out, rows) in DATA.items():
        (root / name).mkdir()
        for split, file, count in (("train", "train", 60), ("test", held_out, rows)):
            source = data_folder / folder / f"{file}.jsonl.gz"
            with gzip.open(source, "rt", encoding="utf-8") as rows:
                text = "".join(itertools.islice(rows, count))
            (root / name / f"{split}.jsonl").write_text(text)
    return root


@pytest.fixture(scope="session")
def train(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Trains a few steps on a base model, which leads the adapter far from zero."""

    def run(
        base: Path,
        *,
        tasks: Sequence[str | dict[str, str]] = ("sst2", "home_depot"),
        steps: int = 3,
        **keys: object,
    ) -> Run:
        folder = tmp_path_factory.mktemp("run")
        content = {
            "base_model": str(base),
            "adapter": {"target_modules": ["q_proj", "down_proj"], "rank": 4},
            "tasks": [
                {"name": one, "template": one, "source": str(small_data / one)}
                if isinstance(one, str)
                else one
                for one in tasks
            ],
            "training": {
                "max_steps": steps,
                "learning_rate": 1e-2,
                "row_length": 256,
                "rows_per_step": 2,
                "on_overflow": "truncate_prompt",
            },
            "run": {"name": "mine", "directory": str(folder / "runs")},
            **keys,
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
        loaded = load_recipe(folder / "recipe.yaml")
        return open_run(start(prepare(loaded), folder / "runs" / "mine"))

    return run


@pytest.fixture(scope="session")
def run(train: Callable[..., Run], stories_folder: Path) -> Run:
    """MTL-LoRA on the tiny model as it is."""
    return train(stories_folder)


@pytest.fixture(scope="session")
def four_bit_run(train: Callable[..., Run], stories_folder: Path) -> Run:
    """MTL-LoRA on the tiny model in NF4."""
    return train(stories_folder, quantization="nf4")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks compare in this process, where the other one is not what a test is about."""

    @contextmanager
    def beside(
        check: WrittenCheck, run: Run, task: Task, folder: Path
    ) -> Iterator[Callable[[], Comparison]]:
        yield lambda: check.compare(questions_about(folder, run, task, check.limit), folder)

    monkeypatch.setattr(WrittenCheck, "beside", beside)


@pytest.fixture(scope="session")
def sharded(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in three shards with an index."""
    folder = Path(shutil.copytree(stories_folder, tmp_path_factory.mktemp("base") / "sharded"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[number::3]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def half(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in bfloat16."""
    folder = Path(shutil.copytree(stories_folder, tmp_path_factory.mktemp("base") / "half"))
    tensors = load_file(folder / "model.safetensors")
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "dtype": "bfloat16"}))
    return folder
