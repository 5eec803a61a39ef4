"""The gradient of one task alone on what tasks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import DECODER, Adapter
from mtl_lora_cli.adapters.methods.base import Role
from mtl_lora_cli.data.epoch_rows import Place
from mtl_lora_cli.evaluation.choices import fill_passes
from mtl_lora_cli.models.host import Dataset, Host, Rows, at_step, examples_in
from mtl_lora_cli.training.observers import undisturbed


def shared_parameters(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors without a task axis, and of no task's decoder."""
    return {
        name: tensor
        for name, tensor in adapter.tensors().items()
        if not name.startswith(DECODER) and _is_shared(adapter.role(name))
    }


def _is_shared(role: Role) -> bool:
    return role.learned and not role.per_task


class TaskGradients:
    """Gradients on the shared parameters θ without dropout. Nothing is added to their `.grad`.

    Examples of a packed row do not see each other, so a task's gradient needs a pass over its own examples
    only, and those of all tasks of a step cost about one more step.

    Args:
        host: the model with the adapter injected.
        adapter: what is trained.
        dataset: the examples.
        row_length: what a pass holds at most.
    """

    def __init__(self, host: Host, adapter: Adapter, dataset: Dataset, row_length: int) -> None:
        self._host, self._adapter, self._dataset = host, adapter, dataset
        self._row_length = row_length
        self._shared = list(shared_parameters(adapter).values())

    def of_each(self, epoch: int, step: int, rows: Rows) -> dict[int, tuple[Tensor, float]]:
        """`of` each task that has units in a step's rows, by rising id."""
        dataset = at_step(self._dataset, epoch, step)
        places: dict[int, list[Place]] = {}
        for row in rows:
            for place in row:
                for task in examples_in(dataset, [[place]]):
                    places.setdefault(task, []).append(place)
        with undisturbed(self._host, self._adapter):
            return {task: self._summed(dataset, places[task], task) for task in sorted(places)}

    def of(self, places: Sequence[Place], task: int) -> tuple[Tensor, float]:
        """∇_θ of the mean ℓ over the task's units of these examples, flat float32 [D], on the CPU; and that
        mean."""
        with undisturbed(self._host, self._adapter):
            return self._summed(self._dataset, places, task)

    def _summed(self, dataset: Dataset, places: Sequence[Place], task: int) -> tuple[Tensor, float]:
        costs = [int(dataset.lengths[entry][number]) for entry, number in places]
        total = [torch.zeros_like(parameter) for parameter in self._shared]
        count, losses = 0, 0.0
        for chosen in fill_passes(costs, self._row_length):
            batch = dataset.collate([[places[i] for i in chosen]])
            mine = batch.owners == task
            count += int(mine.sum())
            moved = batch.to(total[0].device)
            with self._host.routed(moved):
                each = self._host.losses(moved)
                # Other tasks may learn from the same pictures.
                loss = (each if mine.all() else each[mine.to(each.device)]).sum()
                found = torch.autograd.grad(loss, self._shared, allow_unused=True)
            losses += float(loss.detach().double())
            for own, more in zip(total, found, strict=True):
                if more is not None:
                    own.add_(more)
        return torch.cat([own.reshape(-1).float().cpu() for own in total]) / count, losses / count
