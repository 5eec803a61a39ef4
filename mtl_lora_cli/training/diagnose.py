"""Interference between tasks: the cosine of their gradients on the parameters that they share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.data.mixture import Place
from mtl_lora_cli.data.prepare import TrainingData
from mtl_lora_cli.evaluation.choices import fill_passes
from mtl_lora_cli.models.host import Host
from mtl_lora_cli.recipe.schema import Training
from mtl_lora_cli.training.observers import Seen, undisturbed

_COLUMNS = 2**20  # of the gradients that are widened to float64 together


def shared_parameters(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors without a task axis."""
    return {
        name: tensor
        for name, tensor in adapter.tensors().items()
        if not adapter.role(name).per_task
    }


class Diagnosis:
    """Every so many steps: who pulls the shared parameters θ whither.

        g_t = ∇_θ (1 / S_t) Σ_i ℓ_i        over task t's S_t units of the step
        cos_{tu} = ⟨g_t, g_u⟩ / (‖g_t‖ ‖g_u‖)

    for the tasks that stand in the step's rows, at the parameters that the step begins with, without
    dropout. Examples of a packed row do not see each other, so g_t needs a pass over the task's own
    examples only, and all tasks together cost about one more step. Nothing is added to the
    parameters' `.grad`. A process of many computes all of it: nothing has to be exchanged.

    Args:
        host: the model with the adapter injected.
        adapter: what is trained.
        data: the run's tasks and rows.
        settings: the recipe's `training`, with `diagnose`.
    """

    before_update = True
    at_end = False

    def __init__(
        self, host: Host, adapter: Adapter, data: TrainingData, settings: Training
    ) -> None:
        assert settings.diagnose is not None
        self._host, self._adapter, self._data = host, adapter, data
        self._dataset = data.dataset(settings.loss_on)
        self.every = settings.diagnose.every
        self._row_length = settings.row_length
        self._shared = list(shared_parameters(adapter).values())

    def look(self, step: int) -> Seen | None:
        """The step's cosines and norms; None where a gradient is no finite number.

        The step itself ends the run then, and says so.
        """
        places: dict[int, list[Place]] = {}
        for row in self._data.mixture.step(step - 1)[1]:
            for place in row:
                places.setdefault(place[0], []).append(place)
        tasks = sorted(places)
        with undisturbed(self._host, self._adapter):
            gradients = torch.stack([self.gradient(places[task]) for task in tasks])
        cosine, norm = cosines(gradients)
        if not torch.isfinite(norm).all():
            return None
        event = {
            "event": "gradients",
            "step": step,
            "tasks": [self._data.tasks[task].name for task in tasks],
            # A gradient of zero has no direction, and JSON no NaN.
            "cosine": [[None if c != c else c for c in row] for row in cosine.tolist()],
            "norm": norm.tolist(),
        }
        return Seen(event)

    def gradient(self, places: Sequence[Place]) -> Tensor:
        """∇_θ of the mean ℓ over these examples' units, flat float32 [D], on the CPU."""
        lengths = self._dataset.lengths
        costs = [int(lengths[task][number]) for task, number in places]
        total = [torch.zeros_like(parameter) for parameter in self._shared]
        count = 0
        for chosen in fill_passes(costs, self._row_length):
            batch = self._dataset.collate([[places[i] for i in chosen]])
            count += len(batch.owners)
            moved = batch.to(total[0].device)
            with self._host.routed(moved):
                found = torch.autograd.grad(
                    self._host.losses(moved).sum(), self._shared, allow_unused=True
                )
            for own, more in zip(total, found, strict=True):
                if more is not None:
                    own.add_(more)
        return torch.cat([own.reshape(-1).float().cpu() for own in total]) / count


def cosines(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines between the rows of [P, D], and their norms.

    Returns:
        float64 [P, P], symmetric, 1 on the diagonal and NaN beside a row of zeros; float64 [P].
    """
    count = len(gradients)
    products = torch.zeros(count, count, dtype=torch.float64)
    for part in gradients.split(_COLUMNS, dim=1):
        wide = part.double()
        products += wide @ wide.T
    norm = products.diagonal().sqrt()
    cosine = (products + products.T) / 2 / torch.outer(norm, norm)
    there = torch.arange(count)[norm > 0]
    cosine[there, there] = 1.0  # to the last bit
    return cosine, norm
