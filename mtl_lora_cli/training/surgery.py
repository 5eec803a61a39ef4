"""PCGrad: where two tasks pull against each other, each gives up what is against the other.

    g_i ← g_i − min(⟨g_i, g_j⟩, 0) / ‖g_j‖² · g_j        for each j ≠ i, in random order; then Σ_i g_i

with the tasks' gradients g on the parameters that they share (Yu et al., arXiv 2001.06782, algorithm 1). What
belongs to one task learns by its own gradient as ever.

Every g_i stays a sum Σ_j c_ij g_j. So the products are taken once, G = g gᵀ, and the rest is arithmetic of
c [P, P] in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.data.mixture import generator_of
from mtl_lora_cli.machine.processes import ALONE, Processes
from mtl_lora_cli.training.gradients import shared_parameters

_COLUMNS = 2**20  # of the gradients that are widened to float64 together


class Surgery:
    """Takes each task's gradient away after its passes, and puts back what they come to together.

    Args:
        adapter: what is trained.
        seed: of the orders.
        processes: over whom gradients are summed, before they are held against each other.
    """

    def __init__(self, adapter: Adapter, seed: int, processes: Processes = ALONE) -> None:
        learning = adapter.trained()
        self._shared = [learning[name] for name in shared_parameters(adapter) if name in learning]
        self._size = sum(parameter.numel() for parameter in self._shared)
        self._seed, self._processes = seed, processes
        self._own: dict[int, Tensor] = {}

    def take(self, task: int) -> None:
        """A pass of this task alone has ended: its gradient is kept, and the parameters' set to zero."""
        flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in self._shared])
        self._own[task] = self._own[task].add_(flat) if task in self._own else flat
        for parameter in self._shared:
            parameter.grad = None

    def put(self, number: int, tasks: Sequence[int]) -> None:
        """Give the parameters the gradient of a step, counted from 0.

        Only the first of the processes gets it, the others 0: the update sums over them.

        Args:
            number: of the step.
            tasks: that the step's rows have, over all processes.
        """
        like = self._shared[0]
        none = torch.zeros(self._size, dtype=like.dtype, device=like.device)
        gradients = torch.stack([self._own.get(task, none) for task in tasks])
        self._own.clear()
        self._processes.sum_(gradients)
        found = projected(gradients, generator_of(self._seed, "pcgrad", number))
        if not self._processes.main:
            found.zero_()
        parts = found.split([parameter.numel() for parameter in self._shared])
        for parameter, part in zip(self._shared, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()


def projected(gradients: Tensor, generator: np.random.Generator) -> Tensor:
    """The sum of the projected gradients [D] of tasks [P, D]; the order of each is drawn."""
    products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for part in gradients.split(_COLUMNS, dim=1):
        wide = part.double()
        products += (wide @ wide.T).cpu()
    held = products.numpy()
    held = (held + held.T) / 2
    factors = np.eye(len(held))
    for task in range(len(held)):
        for other in generator.permutation(len(held)).tolist():
            against = float(factors[task] @ held[other])  # ⟨g_i as it is now, g_j⟩
            if other != task and against < 0:
                factors[task, other] -= against / held[other, other]
    weights = torch.from_numpy(factors.sum(0)).to(gradients.device, gradients.dtype)
    return weights @ gradients


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
