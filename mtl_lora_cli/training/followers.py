"""Who follows a run's losses: what its recipe asks for of `following` and `balance`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtl_lora_cli.data.dynamic import DynamicMixture
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.recipe.mixing import DynamicMixing
from mtl_lora_cli.recipe.training import Training
from mtl_lora_cli.training.balance import GradNorm, Uncertainty
from mtl_lora_cli.training.following import Following, FollowingShares
from mtl_lora_cli.training.gradients import TaskGradients
from mtl_lora_cli.training.observers import Observer, pass_length
from mtl_lora_cli.training.prepared import ReadyRun

Balancing = (Uncertainty, GradNorm)


def followers(ready: ReadyRun) -> tuple[list[Following], list[Observer]]:
    """Those of a run, and the ones among them that look at steps, too."""
    prepared = ready.prepared
    recipe, data = prepared.recipe, prepared.data
    found: list[Following] = []
    looking: list[Observer] = []
    if isinstance(data.mixture, DynamicMixture):
        assert isinstance(recipe.mixing, DynamicMixing)
        found.append(FollowingShares(data.mixture, recipe.mixing, prepared.total_steps))
    balance, names = recipe.training.balance, [task.name for task in data.tasks]
    if balance is not None and balance.method == "uncertainty":
        found.append(Uncertainty(names, balance))
    if balance is not None and balance.method == "gradnorm":
        dataset = data.dataset(recipe.training.loss_on)
        length = pass_length(dataset, recipe.training)
        gradients = TaskGradients(ready.host, ready.adapter, dataset, length)
        norms = GradNorm(
            names,
            balance,
            gradients,
            data.mixture.step,
            prepared.processes,
        )
        found.append(norms)
        looking.append(norms)
    return found, looking


def pcgrad(settings: Training) -> bool:
    """Whether the tasks' gradients are held against each other."""
    return settings.balance is not None and settings.balance.method == "pcgrad"


def require_followed(
    saved: Mapping[str, Any] | None, name: str, checkpoint: Path
) -> Mapping[str, Any]:
    """The state of one of them in a checkpoint.

    Raises:
        MtlLoraError: there is none.
    """
    if saved is None or name not in saved:
        raise MtlLoraError(
            f"{checkpoint}: nothing is known of '{name}'; the run cannot go on from it"
        )
    found: Mapping[str, Any] = saved[name]
    return found
