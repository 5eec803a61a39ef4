"""Which task is a row of? A small classifier over the texts that a task's prompt reads.

    p(t | texts) = softmax(W f)_t        f [D]: words and pairs of words, hashed, of length one

learned on the run's training rows, each task's weighing the same. Words that no row had leave all tasks alike. At a row without a task every task
that can read the row is asked about the texts that it would read; the likeliest is taken, or none where it is not likely
enough. It loads no base model.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtl_lora_cli.data.prepare import held_out_examples, read_examples
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.runs.atomic import file_checksum, new_folder
from mtl_lora_cli.runs.folder import RunFolder, read_json, save_json
from mtl_lora_cli.tasks.rendering import Renderer
from mtl_lora_cli.tasks.task import Task, require_text

FOLDER = "router"  # in the run folder, and beside exported adapters
CONFIG, TENSORS = "router.json", "router.safetensors"
WIDTH = 4096  # D
ROWS = 500  # of each task that it learns from, at most
LIKELY = 0.5  # below it no task is named
_WORDS = re.compile(r"\w+")
_STEPS, _RATE, _DECAY = 200, 0.05, 1e-3


def features(texts: Sequence[str]) -> Tensor:
    """f of a row's texts, float32 [D]: zeros where there is no word."""
    found = torch.zeros(WIDTH)
    for text in texts:
        words = _WORDS.findall(text.casefold())
        for part in (*words, *(f"{a} {b}" for a, b in pairwise(words))):
            digest = hashlib.blake2b(part.encode("utf-8", "surrogatepass"), digest_size=4).digest()
            found[int.from_bytes(digest, "little") % WIDTH] += 1
    return found / found.norm().clamp(min=1e-9)


@dataclass(frozen=True)
class Router:
    """A learned one.

    Attributes:
        tasks: names, in the order of W's rows.
        weight: W [T, D].
        likely: a task that is not likelier is not named.
    """

    tasks: tuple[str, ...]
    weight: Tensor
    likely: float = LIKELY

    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """p of each task, float32 [T]."""
        return torch.softmax(self.weight @ features(texts), 0)

    def route(self, texts: Mapping[str, Sequence[str]]) -> tuple[str | None, float]:
        """The task, or None where none is likely enough; and the p of the likeliest.

        Args:
            texts: task → what it would read of the row; only of tasks that can read it.
        """
        found = {
            name: float(self.probabilities(own)[self.tasks.index(name)])
            for name, own in texts.items()
        }
        if not found:
            return None, 0.0
        best = max(found, key=lambda name: found[name])
        return (best if found[best] > self.likely else None), found[best]


def learn(features_of: Sequence[Tensor]) -> Tensor:
    """W [T, D] by logistic regression, tasks weighing the same; nothing is drawn.

    Args:
        features_of: of each task [rows, D].
    """
    x = torch.cat(list(features_of))
    y = torch.cat([torch.full((len(own),), t) for t, own in enumerate(features_of)])
    weights = torch.cat([torch.full((len(own),), 1 / len(own)) for own in features_of])
    weight = torch.zeros(len(features_of), WIDTH, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=_RATE)
    for _ in range(_STEPS):
        losses = torch.nn.functional.cross_entropy(x @ weight.T, y, reduction="none")
        loss = (losses * weights).sum() / len(features_of) + _DECAY * weight.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach()


def train_router(run: Run, *, likely: float = LIKELY) -> dict[str, Any]:
    """Learn the run's router, try it on held-out rows, and keep it in the run folder.

    Args:
        run: a finished run; its base model is not loaded.
        likely: see `Router`.

    Returns:
        What router.json says: accuracy on held-out rows, the share of rows that get a task, and the accuracy
        of those, of all tasks and by task.

    Raises:
        UsageError: the run has one task, or a task's rows cannot be read.
    """
    if len(run.tasks) < 2:
        raise UsageError(f"run '{run.folder.name}' has one task: there is nothing to choose")
    for task in run.tasks:
        require_text(task.name, task.objective, "told apart by a router")
    seed = run.recipe.training.seed
    learned = [torch.stack(list(_of_split(task, seed))) for task in run.tasks]
    weight = learn(learned)
    router = Router(tuple(task.name for task in run.tasks), weight, likely)
    content = {"tasks": list(router.tasks), "likely": likely, "width": WIDTH, **_tried(router, run)}
    shutil.rmtree(run.folder.path / FOLDER, ignore_errors=True)
    with new_folder(run.folder.path / FOLDER) as folder:
        save_file({"weight": weight}, folder / TENSORS)
        checksum = file_checksum(folder / TENSORS)
        save_json(folder / CONFIG, {**content, "checkpoint": run.checkpoint, "checksum": checksum})
    return content


def _of_split(task: Task, seed: int) -> Iterator[Tensor]:
    found = read_examples(task, "train", at_most=task.max_examples, seed=seed, labelled=False)
    if found is None or not found.examples:
        raise UsageError(f"task '{task.name}': its source has no train rows to learn a router from")
    step = max(1, len(found.examples) // ROWS)
    for example in found.examples[::step][:ROWS]:
        yield features(example.texts)


def _tried(router: Router, run: Run) -> dict[str, Any]:
    """On each task's held-out rows, as `predict --task auto` would ask: the rows of a task alone."""
    renderers = {task.name: Renderer(task.template, task.name) for task in run.tasks}
    by_task: dict[str, Any] = {}
    right, named, rows = 0, 0, 0
    for task in run.tasks:
        held = held_out_examples(task)
        if held is None or not held.examples:
            continue
        found = [router.route(readable(renderers, row))[0] for row in held.rows[:ROWS]]
        own = sum(name == task.name for name in found)
        there = sum(name is not None for name in found)
        by_task[task.name] = _shares(own, there, len(found))
        right, named, rows = right + own, named + there, rows + len(found)
    return {**_shares(right, named, rows), "by_task": by_task}


def _shares(right: int, named: int, rows: int) -> dict[str, Any]:
    return {
        "rows": rows,
        "accuracy": right / rows if rows else None,
        "named": named / rows if rows else None,
        "accuracy_of_named": right / named if named else None,
    }


def readable(renderers: Mapping[str, Renderer], row: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """Task → the texts that it would read of a row; of those that can read it."""
    found: dict[str, Sequence[str]] = {}
    for name, renderer in renderers.items():
        try:
            found[name] = renderer.render(dict(row), "row", labelled=False).texts
        except UsageError:
            continue
    return found


def load_router(folder: RunFolder, checkpoint: str) -> Router:
    """The run's router.

    Raises:
        UsageError: it has none, or it was learned beside another adapter.
        MtlLoraError: it is damaged.
    """
    path: Path = folder.path / FOLDER
    if not path.is_dir():
        raise UsageError(
            f"run '{folder.name}' has no router; learn one with: mtl-lora router --run {folder.path}"
        )
    content = read_json(path / CONFIG)
    if content.get("checkpoint") != checkpoint:
        raise UsageError(
            f"the router of run '{folder.name}' was learned beside another adapter; learn it anew: "
            f"mtl-lora router --run {folder.path}"
        )
    if file_checksum(path / TENSORS) != content.get("checksum"):
        raise MtlLoraError(f"{path / TENSORS}: damaged: its checksum differs")
    tensors = load_file(path / TENSORS)
    if not math.isfinite(float(content["likely"])):
        raise MtlLoraError(f"{path / CONFIG}: damaged")
    return Router(tuple(content["tasks"]), tensors["weight"], content["likely"])
