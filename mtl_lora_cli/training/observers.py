"""What looks at a run while it learns, and changes nothing of it: the adapter is the same bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.models.packed import PackedModel
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
    """Looks at some of a run's steps; steps are counted from 1.

    Attributes:
        before_update: look at the parameters that the step begins with, not at those it leaves.
    """

    before_update: bool

    def due(self, step: int) -> bool:
        """Whether it wants to look at this step."""

    def look(self, step: int) -> Seen | None:
        """Look; None where there is nothing to tell."""


@contextmanager
def undisturbed(packed: PackedModel, adapter: Adapter) -> Iterator[None]:
    """Without dropout inside, and afterwards with the random state and the modes of before.

    Only the adapter drops anything. The base model's layers stay in their mode: transformers' own
    recompute in the backward pass while they train, and only then.
    """
    modes = [(module, module.training) for module in packed.modules()]
    device = adapter.device
    for module in (packed, *adapter.layers.values()):
        module.training = False
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
