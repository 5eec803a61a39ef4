"""What looks at a run while it learns, and changes nothing of it: the adapter is the same bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.models.host import Dataset, Host
from mtl_lora_cli.recipe.training import Training
from mtl_lora_cli.training.best import Mark


@dataclass(frozen=True)
class Seen:
    """What an observer found.

    Attributes:
        event: its line of metrics.jsonl.
        line: for the person who watches, or None.
        mark: what the best checkpoint is chosen by; None where this look does not choose.
    """

    event: dict[str, Any]
    line: str | None = None
    mark: Mark | None = None


class Observer(Protocol):
    """Looks at some of a run's steps.

    Attributes:
        every: at every so many of them.
        at_start: and before the first one, as step 0.
        at_end: and at the last one.
        before_update: at the parameters that the step begins with, not at those that it leaves.
    """

    every: int
    at_start: bool
    at_end: bool
    before_update: bool

    def look(self, step: int) -> Seen | None:
        """Look at a step, counted from 1; None where there is nothing to tell."""


def due(observers: Sequence[Observer], step: int, total: int) -> list[Observer]:
    """Those that look at a step, counted from 1, of a run of so many."""
    return [one for one in observers if step % one.every == 0 or (one.at_end and step == total)]


def pass_length(dataset: Dataset, settings: Training) -> int:
    """How much a pass of an observer takes: a row's length; of rows that are one picture, as many as a pass
    of training has."""
    own: int | None = getattr(dataset, "row_length", None)
    return settings.row_length if own is None else own * settings.rows_per_pass


@contextmanager
def undisturbed(host: Host, adapter: Adapter) -> Iterator[None]:
    """Without dropout inside, and afterwards with the random state and the modes of before.

    Only the adapter drops anything. The base model's layers stay in their mode: transformers' own
    recompute in the backward pass while they train, and only then.
    """
    modes = [(module, module.training) for module in host.modules()]
    own: nn.Module = next(host.modules())  # itself
    device = adapter.device
    for module in (own, *adapter.layers.values()):
        module.training = False
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
