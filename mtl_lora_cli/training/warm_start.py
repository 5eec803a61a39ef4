"""A run that begins at a finished adapter: the same tasks with more rows, or others beside or instead of them.

What tasks share begins as that adapter has it. A task's own part (Λ_t, w_t, e_t, …) begins as the task of
the same name has it; that of a task which the adapter does not know as the nearest task's: the one through
whose part a few of its training rows have the least loss. From there everything learns, or what
`training.parts` leaves a rate above 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mtl_lora_cli.adapters.files import (
    CONFIG_FILE,
    TENSOR_FILE,
    AdapterFile,
    load_tensors,
    read_adapter_file,
)
from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.data.mixture import subset
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.evaluation.choices import fill_passes
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.models.host import Dataset, Host
from mtl_lora_cli.recipe.load import LoadedRecipe, load_recipe
from mtl_lora_cli.runs.folder import RunFolder, save_json
from mtl_lora_cli.training.add_task import require_agreement
from mtl_lora_cli.training.observers import undisturbed
from mtl_lora_cli.training.prepared import Prepared, ReadyRun

ROWS = 32  # training rows of a task that say which known task is nearest
STARTS = "starts.json"  # beside the adapter that a run begins at


@dataclass(frozen=True)
class TaskStart:
    """Where a task's own part begins.

    Attributes:
        task: of the run.
        at: task of the adapter; None: tasks have no parts of their own.
        loss: mean over the units of a few rows through that part; None where the name decided.
        next_at, next_loss: the nearest after it.
    """

    task: str
    at: str | None
    loss: float | None = None
    next_at: str | None = None
    next_loss: float | None = None

    def __str__(self) -> str:
        if self.at is None:
            return f"{self.task} begins at what all tasks share"
        if self.loss is None:
            return f"{self.task} begins at its own part"
        beside = "" if self.next_at is None else f"; {self.next_at} {self.next_loss:.3f}"
        return (
            f"{self.task} begins at {self.at}, the nearest by {ROWS} rows ({self.loss:.3f}{beside})"
        )


def load_beginning(run: RunFolder, path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe of a run that begins at another's adapter; what it leaves out is as there.

    Raises:
        UsageError: that run is unfinished, its base model is another one by now, or the recipe has another
            adapter or base model.
    """
    opened = Run(run)
    loaded = load_recipe(path, overrides, heir_of=opened.recipe)
    require_agreement(loaded, opened, "at which it begins")
    return loaded


def begin_there(ready: ReadyRun) -> Iterator[str]:
    """Give a fresh adapter its start, write down what begins where, and say so, a line each.

    Raises:
        MtlLoraError: the adapter is damaged, or of another configuration.
    """
    prepared, adapter = ready.prepared, ready.adapter
    folder = ready.run.begins.adapter
    file = read_adapter_file(folder)
    if file.config != adapter.config:
        raise MtlLoraError(f"{folder / CONFIG_FILE}: its configuration is not the recipe's adapter")
    starts = list(_starts(ready.host, adapter, file, prepared, folder))
    starts = prepared.processes.same(starts)  # a card's rounding may order near ties otherwise
    _load(adapter, file, {one.task: one.at for one in starts}, folder)
    if prepared.processes.main:
        content = {"tasks": {one.task: asdict(one) for one in starts}}
        save_json(ready.run.begins.path / STARTS, content)
    yield from map(str, starts)


def _starts(
    host: Host, adapter: Adapter, file: AdapterFile, prepared: Prepared, folder: Path
) -> Iterator[TaskStart]:
    if not any(adapter.role(name).per_task for name in adapter.tensors()):
        yield from (TaskStart(name, None) for name in adapter.tasks)
        return
    new = [name for name in adapter.tasks if name not in file.tasks]
    losses = _losses(host, adapter, file, prepared, new, folder) if new else {}
    for name in adapter.tasks:
        if name not in losses:
            yield TaskStart(name, name)
            continue
        first, *others = sorted(losses[name].items(), key=lambda pair: pair[1])
        yield TaskStart(name, *first, *(others[0] if others else ()))


def _losses(
    host: Host,
    adapter: Adapter,
    file: AdapterFile,
    prepared: Prepared,
    new: Sequence[str],
    folder: Path,
) -> dict[str, dict[str, float]]:
    """New task → known task → loss of a few of its training rows through that one's part."""
    training = prepared.recipe.training
    dataset = prepared.data.dataset(training.loss_on)
    found: dict[str, dict[str, float]] = {name: {} for name in new}
    with undisturbed(host, adapter), torch.no_grad():
        for known in file.tasks:
            _load(adapter, file, dict.fromkeys(adapter.tasks, known), folder)
            for name in new:
                task = adapter.tasks.index(name)
                chosen = subset(len(dataset.lengths[task]), ROWS, training.seed, name)
                found[name][known] = _loss(
                    host, adapter, dataset, task, chosen, training.row_length
                )
    return found


def _loss(
    host: Host, adapter: Adapter, dataset: Dataset, task: int, numbers: Any, row_length: int
) -> float:
    """Mean ℓ over the units of these examples."""
    total, units = 0.0, 0
    costs = [int(dataset.lengths[task][number]) for number in numbers]
    for chosen in fill_passes(costs, row_length):
        batch = dataset.collate([[(task, int(numbers[i])) for i in chosen]]).to(adapter.device)
        with host.routed(batch):
            losses = host.losses(batch)
        total, units = total + float(losses.double().sum()), units + len(losses)
    return total / units


def _load(adapter: Adapter, file: AdapterFile, at: Mapping[str, str | None], folder: Path) -> None:
    """Shared tensors as they are, and of each task the row of that task of the file."""
    places = [file.tasks.index(at[name] or file.tasks[0]) for name in adapter.tasks]
    own = adapter.tensors()
    tensors = {
        name: tensor[places] if name in own and adapter.role(name).per_task else tensor
        for name, tensor in file.tensors.items()
    }
    load_tensors(adapter, tensors, folder / TENSOR_FILE)
