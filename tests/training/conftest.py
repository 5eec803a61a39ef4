"""Small runs on the tiny real model and a few rows of real tasks."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods.base import Settings
from mtl_lora_cli.adapters.weight_start import start_from_weights
from mtl_lora_cli.data.epoch_rows import Place
from mtl_lora_cli.machine.processes import Interrupted
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.journal import Journal
from mtl_lora_cli.training.loop import Trainer
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import Prepared, ReadyRun
from mtl_lora_cli.training.progress import TrainingProgress
from mtl_lora_cli.training.validation import encode_validation

FOLDERS = {
    "sst2": "glue/sst2",
    "rte": "glue/rte",
    "cola": "glue/cola",
    "home_depot": "ads/home_depot",
}


@pytest.fixture(scope="session")
def small_data(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first training rows of four real tasks, and validation rows of the three that have them."""
    root = tmp_path_factory.mktemp("small-data")
    for name, folder in FOLDERS.items():
        (root / name).mkdir()
        for split, count in (("train", 120), ("validation", 40)):
            file = data_folder / folder / f"{split}.jsonl.gz"
            if file.exists():
                with gzip.open(file, "rt", encoding="utf-8") as rows:
                    text = "".join(itertools.islice(rows, count))
                (root / name / f"{split}.jsonl").write_text(text)
    return root


@pytest.fixture(scope="session")
def recipe_file(
    small_data: Path, stories_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A recipe of four tasks and six steps."""
    folder = tmp_path_factory.mktemp("recipe")
    content = {
        "base_model": str(stories_folder),
        "adapter": {"rank": 4, "dropout": 0.1},
        "tasks": [
            {"name": name, "template": name, "source": str(small_data / name)} for name in FOLDERS
        ],
        "training": {
            "max_steps": 6,
            "learning_rate": 3e-3,
            "row_length": 128,
            "rows_per_step": 4,
            "on_overflow": "truncate_prompt",
            "checkpoint_every": 2,
            "keep_checkpoints": 9,
        },
        "run": {"name": "mine", "directory": str(folder / "runs")},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="session")
def prepared(recipe_file: Path) -> Prepared:
    return prepare(load_recipe(recipe_file))


@dataclass(frozen=True)
class Poison:
    """A base model that makes no number of one token.

    Attributes:
        folder: of the model.
        step: the first step, counted from 1, with a row that has the token.
        example: the only example of that step that has it: `'TASK' FILE:LINE`.
    """

    folder: Path
    step: int
    example: str


@pytest.fixture(scope="session")
def poison(
    stories_folder: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Prepared, int], Poison]:
    """`poison(prepared, after)`: the tiny model, spoiled for a run that goes well for some steps."""

    def make(prepared: Prepared, after: int) -> Poison:
        step, (task, number), token = _first_fresh_token(prepared, after)
        folder = tmp_path_factory.mktemp("poisoned")
        apart(stories_folder, folder, token)
        name = prepared.data.tasks[task].name
        return Poison(folder, step, f"'{name}' {small_data / name}/train.jsonl:{number + 1}")

    return make


def apart(stories_folder: Path, folder: Path, poisoned: int | None = None) -> None:
    """The tiny model into `folder`, its head no longer the embedding; no number for one of the tokens."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stories_folder / name, folder)
    config = json.loads((stories_folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights = load_file(stories_folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    if poisoned is not None:
        weights["model.embed_tokens.weight"][poisoned] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _first_fresh_token(prepared: Prepared, after: int) -> tuple[int, Place, int]:
    """Step, counted from 1, example and token: nobody before read the token, nor others of the step."""
    data, seen = prepared.data, set[int]()
    for step in range(prepared.total_steps):
        places = [place for row in data.mixture.step(step)[1] for place in row]
        # An example's last token is not read.
        read = [set(data.splits[t].example(n)[:-1].tolist()) for t, n in places]
        for number, own in enumerate(read):
            others = set[int]().union(*(o for i, o in enumerate(read) if i != number))
            fresh = own - seen - others
            if step >= after and fresh:
                return step + 1, places[number], min(fresh)
        seen |= set[int]().union(*read)
    raise AssertionError("every token comes early")


def together(*arguments: str, count: int = 2, **changes: str) -> list[subprocess.Popen[str]]:
    """Start a Python program as so many processes of one run, as a launcher does."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "PYTHONWARNINGS": "ignore",
            }
            | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


class _Watch(TrainingProgress):
    """Calls something after each step, as a user would do something while a run goes on."""

    def __init__(self, steps: int, done: int, after: Callable[[int], None]) -> None:
        super().__init__(steps, done, Console(file=io.StringIO()))
        self._after = after

    def update(self, event: Mapping[str, Any]) -> None:
        super().update(event)
        self._after(event["step"])


@dataclass
class Small:
    """A run that can be trained, stopped and read."""

    trainer: Trainer
    run: RunFolder

    def train(
        self, *, stop_after: int | None = None, after: Callable[[int], None] = lambda step: None
    ) -> Small:
        def watch(step: int) -> None:
            after(step)
            if step == stop_after:
                os.kill(os.getpid(), signal.SIGINT)

        progress = _Watch(self.trainer.total_steps, self.trainer.position.step, watch)
        journal = Journal(self.run, progress)
        if stop_after is None:
            self.trainer.train(journal)
        else:
            with pytest.raises(Interrupted):
                self.trainer.train(journal)
        return self

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self.trainer.adapter.tensors().items()}

    @property
    def events(self) -> list[dict[str, Any]]:
        return list(self.run.events())

    @property
    def losses(self) -> list[tuple[int, float, dict[str, float]]]:
        return [(event["step"], event["loss"], event["task_loss"]) for event in self.events]


@pytest.fixture
def small(prepared: Prepared, tmp_path: Path) -> Callable[..., Small]:
    """Builds a run; keywords are the recipe's `training`, besides these:

    folder: an earlier run's folder, to go on with it.
    weights: a `loss_weight` for each task.
    adapter: another configuration of the adapter.
    steps: optimiser steps.
    """
    numbers = itertools.count()

    def build(
        *,
        folder: Path | None = None,
        weights: tuple[float, ...] | None = None,
        adapter: Settings | None = None,
        steps: int = 6,
        **training: Any,
    ) -> Small:
        settings = prepared.recipe.training.model_copy(update=training)
        recipe = prepared.recipe.model_copy(update={"training": settings})
        data = prepared.data
        mixture = replace(
            data.mixture,
            row_length=settings.row_length,
            rows_per_step=settings.rows_per_step,
            seed=settings.seed,
        )
        tasks = data.tasks
        if weights is not None:
            tasks = [replace(t, loss_weight=w) for t, w in zip(tasks, weights, strict=True)]
        validation = None
        if settings.validation is not None:
            validation = encode_validation(tasks, recipe, prepared.tokenizer, settings.row_length)
        own = replace(
            prepared,
            recipe=recipe,
            data=replace(data, mixture=mixture, tasks=tasks),
            total_steps=steps,
            validation=validation,
        )
        if adapter is None:
            packed, handle = own.build()
        else:
            from accelerate.utils import set_seed

            from mtl_lora_cli.models.load import load_model
            from mtl_lora_cli.models.packed import PackedModel

            set_seed(settings.seed)
            model = load_model(own.base, dtype=own.dtype, device=own.device)
            handle = inject(model, adapter, [task.name for task in tasks])
            start_from_weights(handle)
            packed = PackedModel(model, handle)
        if folder is None:
            folder = tmp_path / f"run{next(numbers)}"
            folder.mkdir()
        run = RunFolder(folder)
        trainer = Trainer(ReadyRun(own, run, packed, handle), own.observers(packed, handle))
        return Small(trainer, run)

    return build
