"""Interference between tasks: the cosine of their gradients on the parameters that they share."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.data.prepare import TrainingData
from mtl_lora_cli.models.host import Host
from mtl_lora_cli.recipe.training import Training
from mtl_lora_cli.training.gradients import TaskGradients
from mtl_lora_cli.training.observers import Seen, pass_length

_COLUMNS = 2**20  # of the gradients that are widened to float64 together


class Diagnosis:
    """Every so many steps: who pulls the shared parameters θ whither.

        g_t = ∇_θ (1 / S_t) Σ_i ℓ_i        over task t's S_t units of the step
        cos_{tu} = ⟨g_t, g_u⟩ / (‖g_t‖ ‖g_u‖)

    for the tasks that stand in the step's rows, at the parameters that the step begins with, without
    dropout. A process of many computes all of it: nothing has to be exchanged.

    Args:
        host: the model with the adapter injected.
        adapter: what is trained.
        data: the run's tasks and rows.
        settings: the recipe's `training`, with `diagnose`.
    """

    before_update = True
    at_start = False
    at_end = False

    def __init__(
        self, host: Host, adapter: Adapter, data: TrainingData, settings: Training
    ) -> None:
        assert settings.diagnose is not None
        self._data = data
        self.every = settings.diagnose.every
        dataset = data.dataset(settings.loss_on)
        self._gradients = TaskGradients(host, adapter, dataset, pass_length(dataset, settings))

    def look(self, step: int) -> Seen | None:
        """The step's cosines and norms; None where a gradient is no finite number.

        The step itself ends the run then, and says so.
        """
        epoch, rows = self._data.mixture.step(step - 1)
        found = self._gradients.of_each(epoch, step - 1, rows)
        tasks = list(found)
        gradients = torch.stack([found[task][0] for task in tasks])
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
