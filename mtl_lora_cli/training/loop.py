"""The training loop: packed rows in, a trained adapter and a line a step out."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.data.collate import supervised_tokens, training_batch
from mtl_lora_cli.data.mixture import Place
from mtl_lora_cli.data.prepare import TrainingData
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.models.packed import PackedModel, Rounding
from mtl_lora_cli.recipe.schema import Training
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.checkpoints import Position, load_checkpoint, save_checkpoint
from mtl_lora_cli.training.observers import Observer
from mtl_lora_cli.training.parts import parameter_groups
from mtl_lora_cli.training.passes import (
    EagerPasses,
    GraphedPasses,
    Ready,
    Update,
    graphs_possible,
    make_optimizer,
)
from mtl_lora_cli.training.progress import TrainingProgress
from mtl_lora_cli.training.schedule import learning_rate_factor


class Interrupted(KeyboardInterrupt):
    """The user asked to stop; the run was saved."""


@dataclass(frozen=True)
class _Step:
    """One optimiser step before it is run.

    Attributes:
        number, epoch: counted from 0.
        rows: of all processes.
        passes: of this process, ready to run.
        owners: for each pass the task of each question [S].
        tokens: of this process's rows.
        supervised: int64 [T], supervised tokens of each task over all processes.
    """

    number: int
    epoch: int
    rows: list[list[Place]]
    passes: list[Ready]
    owners: list[Tensor]
    tokens: int
    supervised: Tensor


@dataclass(frozen=True)
class _Running:
    """A step that a device may still be working on.

    Attributes:
        prepared: what it is.
        rate: its learning rate.
        loss: this process's −log p summed by task, float64 [T], on the device.
        norm: of the gradients before clipping, on the device.
        end: when the device is done with it, in the device's own time; None on a CPU.
    """

    prepared: _Step
    rate: float
    loss: Tensor
    norm: Tensor
    end: torch.cuda.Event | None


class Trainer:
    """Trains the adapter of one run.

    The loss of a step is Σ_t w_t Σ_i −log p_i / S with the step's S supervised tokens over all
    rows, passes and processes, and w_t the task's `loss_weight`.

    Args:
        accelerator: places model and optimiser.
        packed: base model with the adapter injected.
        adapter: what is trained.
        data: encoded tasks and their mixture.
        settings: the recipe's `training`.
        run: where checkpoints and metrics go.
        base_model: identity of the base model, for the adapter file.
        total_steps: optimiser steps of the whole run.
        observers: look at some of its steps.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        packed: PackedModel,
        adapter: Adapter,
        data: TrainingData,
        settings: Training,
        run: RunFolder,
        base_model: dict[str, Any],
        total_steps: int,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.accelerator = accelerator
        self.adapter = adapter
        self.data = data
        self.settings = settings
        self.run = run
        self.base_model = base_model
        self.total_steps = total_steps
        self.packed = packed
        self.model = accelerator.prepare(packed)
        parameters = list(adapter.tensors().values())
        graphed = accelerator.num_processes == 1 and graphs_possible(
            packed, adapter, accelerator.device
        )
        self.optimizer = make_optimizer(parameter_groups(adapter, settings), graphed=graphed)
        self._update = Update(
            parameters, self.optimizer, settings.max_gradient_norm, graphed=graphed
        )
        eager = EagerPasses(self.model, packed, accelerator.device, accelerator.backward)
        self._passes = (
            GraphedPasses(packed, adapter, settings.row_length, eager) if graphed else eager
        )
        self._observers = tuple(observers)
        self._ahead: _Step | None = None
        self._runs_ahead = accelerator.device.type == "cuda"
        self._clock = 0.0
        self._end: torch.cuda.Event | None = None
        self.position = Position(step=0, metrics_bytes=0, seconds=0.0, tokens=0)
        self._weights = torch.tensor([task.loss_weight for task in data.tasks])
        self._stop = False

    def rounding(self) -> Rounding:
        """What `base_compute: fp8` costs, on the first batch of the run."""
        row = self.data.mixture.step(0)[1][:1]
        return self.packed.rounding(
            training_batch(row, self.data.splits, loss_on=self.settings.loss_on)
        )

    def resume(self, checkpoint: Any) -> None:
        """Go back to a checkpoint; metrics written after it are cut off."""
        self.position = load_checkpoint(checkpoint, self.adapter, self.optimizer)

    def train(self, progress: TrainingProgress) -> None:
        """Run to the end.

        Raises:
            Interrupted: the user stopped it; a checkpoint of the last whole step was saved.
            MtlLoraError: the loss is no longer a finite number.
        """
        self.model.train()
        with self._metrics() as metrics, self._signals():
            self._clock, self._end = time.monotonic(), self._mark()
            running: _Running | None = None
            for step in range(self.position.step, self.total_steps):
                before, after = self._due(step + 1)
                if before and running is not None:
                    self._finish(running, metrics, progress)
                    running = None
                self._look(before, step + 1, metrics, progress)
                launched = self._launch(step)
                if running is not None:  # only now: the card has the next step to work on
                    self._finish(running, metrics, progress)
                running = launched
                last = step + 1 == self.total_steps
                every = self.settings.checkpoint_every
                due = last or bool(every and (step + 1) % every == 0)
                if due or after or self._stop or not self._runs_ahead:
                    self._finish(running, metrics, progress)
                    running = None
                    self._look(after, step + 1, metrics, progress)
                if running is None and (due or self._stop):
                    self._save()
                    if self._stop and not last:
                        raise Interrupted(
                            f"stopped after step {step + 1} and saved; go on with: "
                            f"mtl-lora train --resume --run {self.run.path}"
                        )

    def _due(self, step: int) -> tuple[list[Observer], list[Observer]]:
        """Who looks at a step, counted from 1: before its update, and after it."""
        due = [observer for observer in self._observers if observer.due(step)]
        before = [observer for observer in due if observer.before_update]
        return before, [observer for observer in due if not observer.before_update]

    def _look(
        self,
        observers: Sequence[Observer],
        step: int,
        metrics: TextIO,
        progress: TrainingProgress,
    ) -> None:
        """Let them look while no step is running; the time that they take is no step's."""
        for observer in observers:
            seen = observer.look(step)
            if seen is None:
                continue
            metrics.write(json.dumps(seen.event) + "\n")
            metrics.flush()
            if seen.line is not None:
                progress.say(seen.line)
        if observers:
            self.position = replace(self.position, metrics_bytes=metrics.tell())
            self._clock, self._end = time.monotonic(), self._mark()

    def _launch(self, step: int) -> _Running:
        """Ask for everything of one step; on a card nothing is waited for."""
        prepared = self._prepared(step)
        factor = learning_rate_factor(
            step, self.total_steps, self.settings.warmup, self.settings.schedule
        )
        rate = self.settings.learning_rate * factor
        loss = self._accumulate(prepared)
        norm = self._update(factor)
        if step + 1 < self.total_steps:
            self._ahead = self._prepare(step + 1)
        return _Running(prepared, rate, loss, norm.clone(), self._mark())

    def _mark(self) -> torch.cuda.Event | None:
        if not self._runs_ahead:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _finish(self, running: _Running, metrics: TextIO, progress: TrainingProgress) -> None:
        """Wait for a step, look at it, and write down what it did."""
        loss = self.accelerator.reduce(running.loss).cpu()
        norm = float(running.norm)
        prepared = running.prepared
        if not (math.isfinite(float(loss.sum())) and math.isfinite(norm)):
            present = sorted({task for row in prepared.rows for task, _ in row})
            names = [self.data.tasks[task].name for task in present]
            raise MtlLoraError(
                f"the loss is no longer a finite number at step {prepared.number + 1} "
                f"(tasks {', '.join(names)}); "
                f"checkpoints before it are intact; lower training.learning_rate"
            )
        seconds = self._seconds(running)
        event = self._event(prepared, running.rate, norm, loss, seconds)
        event["tokens_per_second"] = event["tokens"] / max(1e-9, seconds)
        metrics.write(json.dumps(event) + "\n")
        metrics.flush()
        self.position = Position(
            prepared.number + 1,
            metrics.tell(),
            self.position.seconds + seconds,
            self.position.tokens + event["tokens"],
        )
        progress.update(event)

    def _seconds(self, running: _Running) -> float:
        """From the end of the step before to the end of this one."""
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        if running.end is not None and self._end is not None:
            seconds = self._end.elapsed_time(running.end) / 1000
            self._end = running.end
        return seconds

    def _prepared(self, step: int) -> _Step:
        ahead, self._ahead = self._ahead, None
        return ahead if ahead is not None and ahead.number == step else self._prepare(step)

    def _prepare(self, step: int) -> _Step:
        """This process's batches of one step, with the weight of each question in the loss."""
        epoch, rows = self.data.mixture.step(step)
        mine = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        size = self.settings.rows_per_pass
        batches = [
            training_batch(mine[i : i + size], self.data.splits, loss_on=self.settings.loss_on)
            for i in range(0, len(mine), size)
        ]
        owners = [batch.task_ids.view(-1)[batch.positions[batch.owner]] for batch in batches]
        # Of all processes' rows, which every process knows: nothing has to be asked.
        supervised = supervised_tokens(rows, self.data.splits, loss_on=self.settings.loss_on)
        # Gradients are averaged over processes, the loss is a sum over them.
        scale = self.accelerator.num_processes / int(supervised.sum())
        passes = [
            self._passes.prepare(batch, self._weights[owner] * scale)
            for batch, owner in zip(batches, owners, strict=True)
        ]
        tokens = sum(int(self.data.splits[task].lengths[n]) for row in mine for task, n in row)
        return _Step(step, epoch, rows, passes, owners, tokens, supervised)

    def _accumulate(self, prepared: _Step) -> Tensor:
        """Forward and backward over this process's rows; its summed loss of each task [T]."""
        loss = torch.zeros(
            len(self.data.tasks), dtype=torch.float64, device=self.accelerator.device
        )
        for number, (ready, owner) in enumerate(zip(prepared.passes, prepared.owners, strict=True)):
            with self._synchronised(number + 1 == len(prepared.passes)):
                logprobs = self._passes.run(ready)
            loss.index_add_(0, owner.to(loss.device), -logprobs.double())
        return loss

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        if last:
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield

    def _event(
        self, prepared: _Step, rate: float, norm: float, loss: Tensor, seconds: float
    ) -> dict[str, Any]:
        names = [task.name for task in self.data.tasks]
        supervised = prepared.supervised
        event: dict[str, Any] = {
            "event": "step",
            "step": prepared.number + 1,
            "epoch": prepared.epoch,
            "loss": float((loss * self._weights.double()).sum()) / int(supervised.sum()),
            "task_loss": {
                name: float(own) / int(count)
                for name, own, count in zip(names, loss, supervised, strict=True)
                if count
            },
            "supervised": int(supervised.sum()),
            "tokens": prepared.tokens,
            "learning_rate": rate,
            "gradient_norm": norm,
            "seconds": seconds,
        }
        if torch.cuda.is_available():
            event["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return event

    def _save(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.run.checkpoints.mkdir(exist_ok=True)
            save_checkpoint(
                self.run.checkpoints,
                self.position,
                self.adapter,
                self.optimizer,
                self.base_model,
                self.settings.keep_checkpoints,
            )

    @contextmanager
    def _metrics(self) -> Iterator[TextIO]:
        """metrics.jsonl, cut to where the run stands: later lines belong to a lost future."""
        if not self.accelerator.is_main_process:
            with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
                yield nowhere
            return
        self.run.metrics.touch()
        os.truncate(self.run.metrics, self.position.metrics_bytes)
        with self.run.metrics.open("a", encoding="utf-8") as file:
            yield file

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM finish the step; a second one leaves at once."""

        def stop(number: int, frame: Any) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
