"""Optimiser steps: what a step is made of → passes → an update. No files and no words: `bench` takes the
same steps by the clock.

    loss = Σ_s w_s ℓ_s / S        ∇ summed over passes and processes, clipped, AdamW

with the losses ℓ_s of this process's units, their weights w, and the S units of all processes. On a card nothing is waited for: the next step is prepared, and asked for, while this one runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.machine.processes import ALONE, Processes
from mtl_lora_cli.models.host import Batch, Host
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.recipe.training import Clipping
from mtl_lora_cli.training.capacity import PassSizes
from mtl_lora_cli.training.clipping import RelativeClipping
from mtl_lora_cli.training.passes import EagerPasses, GraphedPasses, Ready, graphs_possible
from mtl_lora_cli.training.surgery import Surgery
from mtl_lora_cli.training.update import ParameterGroup, Update, make_optimizer
from mtl_lora_cli.training.zero import ZeroUpdate


@dataclass(frozen=True)
class StepPlan:
    """What one step is made of, on the CPU.

    Attributes:
        batches: of this process, one a pass.
        weights: of each batch w float32 [S].
        owners: of each batch int64 [S], the task whose loss each unit's is.
        count: S of all processes together.
        idle: passes of this process that count for nothing: others have more, and where weights are
            cut into parts all must run as many.
        tasks: that the step has, over all processes; read where gradients of tasks are held against each
            other. Then every batch is one task's.
    """

    batches: Sequence[Batch]
    weights: Sequence[Tensor]
    owners: Sequence[Tensor]
    count: int
    idle: Sequence[Batch] = ()
    tasks: Sequence[int] = ()


P = TypeVar("P", bound=StepPlan)


@dataclass(frozen=True)
class Running(Generic[P]):
    """A step that a device may still be working on.

    Attributes:
        planned: what it is made of.
        losses: Σ ℓ by task over all processes, and behind them the sum of their flags, float64
            [T + 1], on the device.
        values: ℓ of each pass, float64 [S], on the device.
        norm: of the gradients before clipping, on the device.
        end: when the device is done with it, in the device's own time; None on a CPU.
    """

    planned: P
    losses: Tensor
    values: list[Tensor]
    norm: Tensor
    end: torch.cuda.Event | None


@dataclass(frozen=True)
class _Prepared(Generic[P]):
    """A step of which all that the CPU has to do is done."""

    number: int
    planned: P
    passes: list[Ready]
    idle: list[Ready]


class Stepper(Generic[P]):
    """Takes optimiser steps.

    Args:
        host: the model with the adapter injected.
        adapter: what is trained.
        plan: what step `number`, counted from 0, is made of.
        total: no step after this one is prepared.
        groups: what learns, by rate and decay.
        max_norm: at which gradients are clipped.
        clipping: by each tensor's own history; None: by `max_norm` alone.
        sizes: of the passes.
        processes: this one among those that step together.
        zero: DeepSpeed's configuration; None where nothing is cut into parts.
        surgery: what becomes of the tasks' gradients before the update; None: they are summed.

    Attributes:
        update: who updates the parameters.
        passes: who runs a pass.
        runs_ahead: a step is asked for before the one before it has ended.
    """

    def __init__(
        self,
        host: Host,
        adapter: Adapter,
        plan: Callable[[int], P],
        *,
        total: int,
        groups: Sequence[ParameterGroup],
        max_norm: float,
        clipping: Clipping | None = None,
        sizes: PassSizes,
        processes: Processes = ALONE,
        zero: Mapping[str, Any] | None = None,
        surgery: Surgery | None = None,
    ) -> None:
        self._surgery = surgery
        self._plan, self._total, self._processes = plan, total, processes
        self._tasks = len(adapter.tasks)
        self._device = adapter.device
        self.runs_ahead = self._device.type == "cuda"
        self._ahead: _Prepared[P] | None = None
        graphed = surgery is None and graphs_possible(host, self._device)
        losses: Callable[[Any], Tensor] = host.losses
        learning = list(adapter.trained().values())
        history = None if clipping is None else RelativeClipping(learning, clipping, max_norm)
        self.update: Update | ZeroUpdate
        if zero is not None:
            self.update = ZeroUpdate(host, adapter, groups, zero, processes, history)
            losses, graphed = self.update.losses, graphed and not self.update.same_passes
        else:
            optimizer = make_optimizer(groups, graphed=graphed)
            self.update = Update(
                learning,
                optimizer,
                max_norm,
                graphed=graphed,
                processes=processes,
                clipping=history,
            )
        self.passes: EagerPasses | GraphedPasses = EagerPasses(losses, host, self._device)
        if graphed and isinstance(host, PackedModel):
            self.passes = GraphedPasses(host, adapter, sizes, self.passes)

    def launch(self, number: int, factor: float, flag: float = 0.0) -> Running[P]:
        """Ask for everything of one step; on a card nothing is waited for.

        Args:
            number: of the step, counted from 0.
            factor: of the peak learning rates.
            flag: what this process has to tell the others: it is summed with the losses.
        """
        ahead, self._ahead = self._ahead, None
        prepared = ahead if ahead is not None and ahead.number == number else self.prepare(number)
        losses, values = self.accumulate(prepared, flag)
        norm = self.update(factor)
        # Asked for here: behind the next step's work it would wait for it.
        self._processes.sum_(losses)
        if number + 1 < self._total:
            self._ahead = self.prepare(number + 1)
        return Running(prepared.planned, losses, values, norm.clone(), self.mark())

    def prepare(self, number: int) -> _Prepared[P]:
        """All of a step that needs no device."""
        planned = self._plan(number)
        scale = self.update.loss_scale / planned.count
        passes = [
            self.passes.prepare(batch, weights * scale)
            for batch, weights in zip(planned.batches, planned.weights, strict=True)
        ]
        idle = planned.idle if self.update.same_passes else ()
        nothing = [self.passes.prepare(batch, torch.zeros(len(batch.owners))) for batch in idle]
        return _Prepared(number, planned, passes, nothing)

    def accumulate(self, prepared: _Prepared[P], flag: float = 0.0) -> tuple[Tensor, list[Tensor]]:
        """Forward and backward over this process's passes: `losses` and `values` of `Running`, of this
        process alone."""
        losses = torch.zeros(self._tasks + 1, dtype=torch.float64, device=self._device)
        losses[self._tasks] = flag
        values = []
        for ready, owner in zip(prepared.passes, prepared.planned.owners, strict=True):
            values.append(self.passes.run(ready).double())
            losses.index_add_(0, owner.to(losses.device, non_blocking=True), values[-1])
            if self._surgery is not None:
                self._surgery.take(int(owner[0]))
        for ready in prepared.idle:
            self.passes.run(ready)
        if self._surgery is not None:
            self._surgery.put(prepared.number, prepared.planned.tasks)
        return losses, values

    def mark(self) -> torch.cuda.Event | None:
        """Now, in the device's own time; None on a CPU."""
        if not self.runs_ahead:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class StepClock:
    """Seconds from the end of one step to the end of the next.

    Args:
        mark: `Stepper.mark`.
    """

    def __init__(self, mark: Callable[[], torch.cuda.Event | None]) -> None:
        self._mark = mark
        self.restart()

    def restart(self) -> None:
        """What was done since the last step is no step's."""
        self._clock, self._end = time.monotonic(), self._mark()

    def lap(self, end: torch.cuda.Event | None) -> float:
        """Seconds of the step that ended now, or, on a card, at `end`."""
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        if end is not None and self._end is not None:
            seconds = self._end.elapsed_time(end) / 1000
            self._end = end
        return seconds
