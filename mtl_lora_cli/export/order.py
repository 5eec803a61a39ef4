"""What is written: one task of a run, where to, and as the call asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.export.comparison import Comparison
from mtl_lora_cli.export.low_rank import Truncation, updates_at
from mtl_lora_cli.export.merge import Update, directions
from mtl_lora_cli.tasks.task import Task

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How a call of `merge` or `export` wants it.

    Attributes:
        rank: a lower rank than the update's own, see `low_rank`; None: its own.
        base: merge into the `original` weights, or into `dequantized` ones: those that a quantised run saw.
        limit: held-out examples to compare on.
        tolerance: largest difference of log-probabilities allowed; None: the format's, or by dtype.
        checked: compare at all.
    """

    rank: int | None = None
    base: str = "original"
    limit: int = 32
    tolerance: float | None = None
    checked: bool = True


@dataclass(frozen=True)
class Order:
    """One task of a run on its way to a folder.

    Attributes:
        run, task: what is written.
        folder: where to.
        options: as the call asks.
        say: called with progress lines.
        known: what a format has found out about it.
    """

    run: Run
    task: Task
    folder: Path
    options: Options = Options()
    say: Say = lambda text: None
    known: dict[str, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def _lowered(self) -> tuple[dict[str, Update], Truncation | None]:
        return updates_at(self.run, self.task, self.options.rank)

    @property
    def updates(self) -> Mapping[str, Update]:
        """Weight of the model → A' [k, in], B' [out, k] and s of ΔW = s B' A': the task's ordinary LoRA.

        Raises:
            UsageError: the method is no LoRA for any task, or the rank is too large.
        """
        return self._lowered[0]

    @property
    def parts(self) -> tuple[Mapping[str, Update], Mapping[str, Tensor]]:
        """`updates`; and, of a method that scales rows, the lengths m of the rows of V = W + s B A, whose B A
        then stand in the place of updates.

        Raises:
            UsageError: as `updates`; or such a method at a lower rank.
        """
        adapter = self.run.adapter
        if not adapter.config.scales_rows:
            return self.updates, {}
        if self.options.rank is not None:
            raise UsageError(f"--rank is for LoRA; {adapter.config.method} is none for any task")
        return directions(adapter)

    @property
    def truncation(self) -> Truncation | None:
        """What a lower rank leaves out; None where the rank is the update's own."""
        return None if self.run.adapter.config.scales_rows else self._lowered[1]

    @property
    def reduced(self) -> str:
        """The same as a paragraph of a card, or nothing."""
        truncation = self.truncation
        return "" if truncation is None else f"\n\nThe rank was reduced: {truncation}."

    @property
    def title(self) -> str:
        """What it is, for a file's own metadata."""
        return f"{self.task.name} of {self.run.folder.name}"


@dataclass(frozen=True)
class WrittenFolder:
    """A written folder and how it compared; None where nothing was compared, or no rank was lowered."""

    task: str
    folder: Path
    comparison: Comparison | None
    truncation: Truncation | None = None
