"""Factors of the tasks' losses that are learned while the adapter is: by uncertainty, or by gradient norms.

The factor λ_t stands beside the task's own `loss_weight` w_t: a step's loss is Σ_t w_t λ_t Σ_i ℓ_i / S, and
L_t is the mean ℓ of the task's units in a step.

    uncertainty    λ_t = exp(−s_t), s_t = log σ_t² is learned with the loss  exp(−s_t) L_t + s_t / 2
                   (Kendall, Gal and Cipolla, arXiv 1705.07115, its equation for classification)
    gradnorm       Σ_t | λ_t ‖∇L_t‖ − Ḡ r_t^α | is made small, and Σ_t λ_t = T       (arXiv 1711.02257)

Both are learned by plain gradient descent in float64. As everything that follows the losses (`following`) a
change holds from the third step on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.data.epoch_rows import Place
from mtl_lora_cli.machine.processes import ALONE, Processes
from mtl_lora_cli.recipe.training import Balance
from mtl_lora_cli.training.following import LAG
from mtl_lora_cli.training.gradients import TaskGradients
from mtl_lora_cli.training.observers import Seen

RowsOf = Callable[[int], tuple[int, list[list[Place]]]]  # epoch and rows of a step
RATE, ALPHA, EVERY = 0.025, 1.5, 10  # where the recipe does not say
_LEAST = 1e-3  # of a factor of GradNorm's: descent could make it negative


class Factors:
    """λ of the next steps: what is learned at one of them holds `LAG` steps later.

    Args:
        names: of the tasks.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._coming = deque([[1.0] * len(names)] * LAG, maxlen=LAG + 1)
        self._first = 0  # step of the first of them

    def at(self, number: int) -> Tensor:
        """λ of a step, float32 [T]."""
        return torch.tensor(self._coming[number - self._first], dtype=torch.float32)

    def push(self, number: int, factors: Sequence[float]) -> None:
        """Step `number` has ended; these hold at `number + LAG`."""
        self._coming.append(list(factors))
        self._first = number

    def state(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {"coming": list(self._coming), "first": self._first}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to such a state."""
        self._coming.clear()
        self._coming.extend(state["coming"])
        self._first = state["first"]


class Uncertainty:
    """λ_t = exp(−s_t) with s_t ← s_t − η (1/2 − exp(−s_t) L_t), of tasks that a step has.

    Args:
        names: of the tasks.
        settings: the recipe's `training.balance`.
    """

    name = "balance"

    def __init__(self, names: Sequence[str], settings: Balance) -> None:
        self.factors = Factors(names)
        self._rate = settings.rate or RATE
        self._logs = [0.0] * len(names)

    def observe(self, number: int, loss: Sequence[float], units: Sequence[int]) -> Seen:
        """See `following.Following`."""
        for task, count in enumerate(units):
            if count:
                pull = 0.5 - math.exp(-self._logs[task]) * loss[task] / count
                self._logs[task] -= self._rate * pull
        found = [math.exp(-value) for value in self._logs]
        self.factors.push(number, found)
        return _seen(self.factors.names, number, found)

    def state(self) -> dict[str, Any]:
        """See `following.Following`."""
        return {"factors": self.factors.state(), "logs": self._logs}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `following.Following`."""
        self.factors.restore(state["factors"])
        self._logs = list(state["logs"])


class GradNorm:
    """λ_t ← λ_t − η · sign(λ_t n_t − Ḡ r_t^α) n_t at every so many steps, then Σ λ = T.

    n_t = ‖∇ L_t‖ over the parameters that tasks share, Ḡ the mean of λ_t n_t, and r_t = l_t / mean l with l_t
    = L_t over the L_t of the task's first look, all of the tasks that stand in the step's rows. It is an
    observer, too: it looks before an update.

    Args:
        names: of the tasks.
        settings: the recipe's `training.balance`.
        gradients: of each task alone.
        rows: what a step, counted from 0, is made of.
        processes: this one among those of the run: what the first one finds holds for all.
    """

    name = "balance"
    before_update = True
    at_start = False
    at_end = False

    def __init__(
        self,
        names: Sequence[str],
        settings: Balance,
        gradients: TaskGradients,
        rows: RowsOf,
        processes: Processes = ALONE,
    ) -> None:
        self.factors = Factors(names)
        self._rate = settings.rate or RATE
        self._alpha = ALPHA if settings.alpha is None else settings.alpha
        self.every = settings.every or EVERY
        self._gradients, self._rows, self._processes = gradients, rows, processes
        self._now = [1.0] * len(names)
        self._first: list[float | None] = [None] * len(names)

    def look(self, step: int) -> Seen | None:
        """See `observers.Observer`: a step's gradients move the factors."""
        norms: dict[int, float] = {}
        losses: dict[int, float] = {}
        epoch, rows = self._rows(step - 1)
        for task, (gradient, loss) in self._gradients.of_each(epoch, step - 1, rows).items():
            norms[task], losses[task] = float(gradient.double().norm()), loss
        norms, losses = self._processes.same((norms, losses))
        if not all(map(math.isfinite, (*norms.values(), *losses.values()))):
            return None  # the step itself ends the run, and says so
        for task, loss in losses.items():
            if self._first[task] is None:
                self._first[task] = loss
        first = {task: self._first[task] or 0.0 for task in losses}
        self._now = moved(self._now, norms, losses, first, self._rate, self._alpha)
        names = self.factors.names
        return Seen(
            {
                "event": "balance",
                "step": step,
                "factors": dict(zip(names, self._now, strict=True)),
                "norm": {names[task]: norm for task, norm in norms.items()},
            }
        )

    def observe(self, number: int, loss: Sequence[float], units: Sequence[int]) -> None:
        """See `following.Following`."""
        self.factors.push(number, self._now)

    def state(self) -> dict[str, Any]:
        """See `following.Following`."""
        return {"factors": self.factors.state(), "now": self._now, "first": self._first}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `following.Following`."""
        self.factors.restore(state["factors"])
        self._now, self._first = list(state["now"]), list(state["first"])


def moved(
    factors: Sequence[float],
    norms: Mapping[int, float],
    losses: Mapping[int, float],
    first: Mapping[int, float],
    rate: float,
    alpha: float,
) -> list[float]:
    """One step of GradNorm's descent; see `GradNorm`.

    Args:
        factors: λ of all tasks.
        norms, losses, first: n_t, L_t and the L_t of the first look, of those tasks that are there.
        rate: η.
        alpha: α.
    """
    pulls = {task: factors[task] * norm for task, norm in norms.items()}
    mean = math.fsum(pulls.values()) / len(pulls)
    ratios = {task: losses[task] / first[task] if first[task] else 1.0 for task in losses}
    middle = math.fsum(ratios.values()) / len(ratios)
    found = list(factors)
    for task, norm in norms.items():
        relative = ratios[task] / middle if middle else 1.0
        apart = pulls[task] - mean * relative**alpha
        found[task] = max(_LEAST, found[task] - rate * norm * ((apart > 0) - (apart < 0)))
    total = math.fsum(found)
    return [value * len(found) / total for value in found]


def _seen(names: Sequence[str], number: int, factors: Sequence[float]) -> Seen:
    """The factors that a step leads to."""
    return Seen(
        {
            "event": "balance",
            "step": number + 1,
            "factors": dict(zip(names, factors, strict=True)),
        }
    )
