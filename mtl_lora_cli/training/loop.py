"""The training loop: packed rows in, a trained adapter and a line a step out."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.data.collate import supervised_tokens, training_batch
from mtl_lora_cli.data.mixture import Place
from mtl_lora_cli.data.prepare import TrainingData
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.machine.processes import ALONE, Interrupted, Processes
from mtl_lora_cli.machine.rate import floor_of
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.packed import PackedModel, Rounding
from mtl_lora_cli.recipe.schema import Training
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.best import Best, Mark, best_after
from mtl_lora_cli.training.checkpoints import (
    Position,
    checkpoint_of,
    is_whole,
    load_checkpoint,
    newest_checkpoint,
    random_states,
    save_checkpoint,
)
from mtl_lora_cli.training.observers import Observer
from mtl_lora_cli.training.parts import parameter_groups
from mtl_lora_cli.training.passes import EagerPasses, GraphedPasses, Ready, graphs_possible
from mtl_lora_cli.training.progress import TrainingProgress
from mtl_lora_cli.training.schedule import learning_rate_factor
from mtl_lora_cli.training.update import Update, make_optimizer
from mtl_lora_cli.training.zero import ZeroUpdate


@dataclass(frozen=True)
class _Step:
    """One optimiser step before it is run.

    Attributes:
        number, epoch: counted from 0.
        rows: of all processes.
        places: of this process, the examples of each pass.
        passes: of this process, ready to run.
        owners: for each pass the task of each question [S].
        tokens: of all rows.
        supervised: int64 [T], supervised tokens of each task over all processes.
    """

    number: int
    epoch: int
    rows: list[list[Place]]
    places: list[list[Place]]
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
        loss: −log p summed by task, and how many were asked to stop, over all processes, float64
            [T + 1], on the device.
        logprobs: of each pass, float64 [S], on the device.
        norm: of the gradients before clipping, on the device.
        end: when the device is done with it, in the device's own time; None on a CPU.
    """

    prepared: _Step
    rate: float
    loss: Tensor
    logprobs: list[Tensor]
    norm: Tensor
    end: torch.cuda.Event | None


class Trainer:
    """Trains the adapter of one run.

    The loss of a step is Σ_t w_t Σ_i −log p_i / S with the step's S supervised tokens over all
    rows, passes and processes, and w_t the task's `loss_weight`.

    Args:
        packed: base model with the adapter injected.
        adapter: what is trained.
        data: encoded tasks and their mixture.
        settings: the recipe's `training`.
        run: where checkpoints and metrics go.
        base_model: identity of the base model, for the adapter file.
        total_steps: optimiser steps of the whole run.
        observers: look at some of its steps.
        processes: this one among those of the run.
        zero: DeepSpeed's configuration; None where nothing is cut into parts.
        tell: is told of every event that is written down.
        where: names a training example for the user: task id and number → file and line.
    """

    def __init__(
        self,
        packed: PackedModel,
        adapter: Adapter,
        data: TrainingData,
        settings: Training,
        run: RunFolder,
        base_model: dict[str, Any],
        total_steps: int,
        observers: Sequence[Observer] = (),
        *,
        processes: Processes = ALONE,
        zero: Mapping[str, Any] | None = None,
        tell: Callable[[Mapping[str, Any]], None] = lambda event: None,
        where: Callable[[int, int], str] = lambda task, number: f"example {number}",
    ) -> None:
        self.processes = processes
        self.adapter = adapter
        self.data = data
        self.settings = settings
        self.run = run
        self.base_model = base_model
        self.total_steps = total_steps
        self.packed = packed
        self._where, self._tell = where, tell
        self._device = adapter.device
        # Counted before weights are cut into parts.
        self._floor = floor_of(packed.model, self._device, processes.count)
        self._start_learning(zero)
        self._observers = tuple(observers)
        self._ahead: _Step | None = None
        self._runs_ahead = self._device.type == "cuda"
        self._clock = 0.0
        self._end: torch.cuda.Event | None = None
        self.position = Position(step=0, metrics_bytes=0, seconds=0.0, tokens=0)
        self._weights = torch.tensor([task.loss_weight for task in data.tasks])
        self._stop_asked = False  # of this process
        self._stop_agreed = False  # all know, since the same step

    def _start_learning(self, zero: Mapping[str, Any] | None) -> None:
        """Who runs passes, and who updates."""
        groups = parameter_groups(self.adapter, self.settings)
        packed, adapter, device = self.packed, self.adapter, self._device
        self.update: Update | ZeroUpdate
        graphed = graphs_possible(packed, adapter, device)
        model: Callable[[PackedBatch], Tensor] = packed
        if zero is not None:
            self.update = ZeroUpdate(packed, adapter, groups, zero, self.processes)
            model, graphed = self.update.model, graphed and not self.update.same_passes
        else:
            self.update = Update(
                list(adapter.trained().values()),
                make_optimizer(groups, graphed=graphed),
                self.settings.max_gradient_norm,
                graphed=graphed,
                processes=self.processes,
            )
        eager = EagerPasses(model, packed, device)
        self._passes: EagerPasses | GraphedPasses
        self._passes = (
            GraphedPasses(packed, adapter, self.settings.row_length, eager) if graphed else eager
        )

    def rounding(self) -> Rounding:
        """What `base_compute: fp8` costs, on the first batch of the run."""
        row = self.data.mixture.step(0)[1][:1]
        return self.packed.rounding(
            training_batch(row, self.data.splits, loss_on=self.settings.loss_on)
        )

    def resume(self, checkpoint: Any) -> Best | None:
        """Go back to a checkpoint; metrics written after it are cut off.

        Returns:
            The best look so far, where it cannot count any more because its checkpoint is damaged or
            gone.
        """
        position = load_checkpoint(
            checkpoint, self.adapter, self.update, self.processes.rank, self.settings.seed
        )
        validation = self.settings.validation
        best = position.best if validation is not None and validation.best is not None else None
        there = best is not None and is_whole(checkpoint_of(self.run.checkpoints, best.step))
        kept = self.processes.same(best if there else None)
        self.position = replace(position, best=kept)
        return best if kept is None else None

    @property
    def settled(self) -> bool:
        """Whether as many looks as the recipe has patience for were no better than the best one."""
        best, validation = self.position.best, self.settings.validation
        patience = None if validation is None else validation.patience
        return best is not None and patience is not None and best.waited >= patience

    def train(self, progress: TrainingProgress) -> None:
        """Run to the end, or until nothing gets better: see `settled`.

        Raises:
            Interrupted: the user stopped it; a checkpoint of the last whole step was saved.
            MtlLoraError: the loss is no longer a finite number.
        """
        self.packed.train()
        with _without_long_collections(), self._metrics() as metrics, self._signals():
            self._clock, self._end = time.monotonic(), self._mark()
            running: _Running | None = None
            for step in range(self.position.step, self.total_steps):
                if self.settled:
                    break
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
                if due or after or self._stopping or not self._runs_ahead:
                    self._finish(running, metrics, progress)
                    running = None
                    self._look(after, step + 1, metrics, progress)
                    best = self.position.best
                    last = last or self.settled
                    due = due or last or (best is not None and best.step == step + 1)
                if running is None and (due or self._stopping):
                    self._save()
                    if self._stopping and not last:
                        raise Interrupted(
                            f"stopped after step {step + 1} and saved; go on with: "
                            f"mtl-lora train --resume --run {self.run.path}"
                        )

    @property
    def _stopping(self) -> bool:
        """Whether to stop after this step: alone at once, with others when all know."""
        return self._stop_agreed or (self.processes.count == 1 and self._stop_asked)

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
            self._write(metrics, seen.event)
            progress.look(seen.event, seen.line)
            if seen.mark is not None:
                self._judge(seen.mark, step, metrics, progress)
        if observers:
            self.position = replace(self.position, metrics_bytes=metrics.tell())
            self._clock, self._end = time.monotonic(), self._mark()

    def _judge(self, mark: Mark, step: int, metrics: TextIO, progress: TrainingProgress) -> None:
        """Remember a look that is the best so far."""
        best = best_after(self.position.best, mark, step)
        self.position = replace(self.position, best=best)
        if best is not None and best.step == step:
            self._write(metrics, best.event)
            progress.look(best.event, f"best so far: {best}")

    def _launch(self, step: int) -> _Running:
        """Ask for everything of one step; on a card nothing is waited for."""
        prepared = self._prepared(step)
        factor = learning_rate_factor(
            step, self.total_steps, self.settings.warmup, self.settings.schedule
        )
        rate = self.settings.learning_rate * factor
        loss, logprobs = self._accumulate(prepared)
        norm = self.update(factor)
        self.processes.sum_(
            loss
        )  # asked for here: behind the next step's work it would wait for it
        if step + 1 < self.total_steps:
            self._ahead = self._prepare(step + 1)
        return _Running(prepared, rate, loss, logprobs, norm.clone(), self._mark())

    def _mark(self) -> torch.cuda.Event | None:
        if not self._runs_ahead:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _finish(self, running: _Running, metrics: TextIO, progress: TrainingProgress) -> None:
        """Wait for a step, look at it, and write down what it did."""
        *task_loss, asked = running.loss.tolist()
        loss = torch.tensor(task_loss, dtype=torch.float64)
        self._stop_agreed = self._stop_agreed or asked > 0
        norm = float(running.norm)
        prepared = running.prepared
        if not (math.isfinite(float(loss.sum())) and math.isfinite(norm)):
            raise MtlLoraError(self._no_number(running))
        seconds = self._seconds(running)
        event = self._event(prepared, running.rate, norm, loss, seconds)
        speed = event["tokens"] / max(1e-9, seconds)
        event["tokens_per_second"] = speed
        if self._floor is not None:
            supervised_share = event["supervised"] / event["tokens"]
            event["floor_share"] = self._floor.share(speed, supervised_share)
        self._write(metrics, event)
        self.position = replace(
            self.position,
            step=prepared.number + 1,
            metrics_bytes=metrics.tell(),
            seconds=self.position.seconds + seconds,
            tokens=self.position.tokens + event["tokens"],
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
        mine, size = self.processes.mine(rows), self.settings.rows_per_pass
        passes_of_rows = [mine[i : i + size] for i in range(0, len(mine), size)]
        batches = [
            training_batch(some, self.data.splits, loss_on=self.settings.loss_on)
            for some in passes_of_rows
        ]
        owners = [batch.task_ids.view(-1)[batch.positions[batch.owner]] for batch in batches]
        # Of all processes' rows, which every process knows: nothing has to be asked.
        supervised = supervised_tokens(rows, self.data.splits, loss_on=self.settings.loss_on)
        scale = self.update.loss_scale / int(supervised.sum())
        passes = [
            self._passes.prepare(batch, self._weights[owner] * scale)
            for batch, owner in zip(batches, owners, strict=True)
        ]
        tokens = sum(int(self.data.splits[task].lengths[n]) for row in rows for task, n in row)
        places = [[place for row in some for place in row] for some in passes_of_rows]
        return _Step(step, epoch, rows, places, passes, owners, tokens, supervised)

    def _accumulate(self, prepared: _Step) -> tuple[Tensor, list[Tensor]]:
        """Forward and backward over this process's rows: `loss` and `logprobs` of `_Running`."""
        tasks = len(self.data.tasks)
        loss = torch.zeros(tasks + 1, dtype=torch.float64, device=self._device)
        loss[tasks] = float(self._stop_asked)
        logprobs = []
        for ready, owner in zip(prepared.passes, prepared.owners, strict=True):
            logprobs.append(self._passes.run(ready).double())
            loss.index_add_(0, owner.to(loss.device), -logprobs[-1])
        for ready in self._idle_passes(prepared):
            self._passes.run(ready)
        return loss, logprobs

    def _idle_passes(self, prepared: _Step) -> list[Ready]:
        """Passes that count for nothing, where others have more rows and all must run as many."""
        if not self.update.same_passes:
            return []
        most = -(-len(prepared.rows) // self.processes.count)
        missing = -(-most // self.settings.rows_per_pass) - len(prepared.passes)
        if not missing:
            return []
        any_row = training_batch(prepared.rows[:1], self.data.splits, loss_on=self.settings.loss_on)
        nothing = torch.zeros(len(any_row.owner))
        return [self._passes.prepare(any_row, nothing)] * missing

    def _event(
        self, prepared: _Step, rate: float, norm: float, loss: Tensor, seconds: float
    ) -> dict[str, Any]:
        names = [task.name for task in self.data.tasks]
        supervised = prepared.supervised
        drawn = Counter(task for row in prepared.rows for task, _ in row)
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
            "examples": {names[task]: count for task, count in sorted(drawn.items())},
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
        """Rank 0 writes; what is cut into parts, and everybody's random states, come to it."""
        moments = self.update.state(self.adapter.trained())
        states = self.processes.gather(random_states())
        if self.processes.main:
            self.run.checkpoints.mkdir(exist_ok=True)
            save_checkpoint(
                self.run.checkpoints,
                self.position,
                self.adapter,
                moments,
                states,
                self.base_model,
                self.settings.keep_checkpoints,
            )
        self.processes.wait()

    def _no_number(self, running: _Running) -> str:
        """What a loss that is no number has to do with: the step's tasks, and the examples."""
        prepared = running.prepared
        present = sorted({task for row in prepared.rows for task, _ in row})
        names = ", ".join(self.data.tasks[task].name for task in present)
        found = sorted(
            {one for some in self.processes.gather(self._poisoned(running)) for one in some}
        )
        examples = sum(len(row) for row in prepared.rows)
        if not found:
            seen = "all losses are numbers, but their gradient is not"
        elif len(found) == examples:
            seen = f"of all {examples} examples"
        else:
            told = [f"'{self.data.tasks[t].name}' {self._where(t, n)}" for t, n in found[:3]]
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            seen = f"of {len(found)} of {examples} examples: {', '.join(told)}{more}"
        last = newest_checkpoint(self.run.checkpoints)
        return (
            f"the loss is no longer a finite number at step {prepared.number + 1} (tasks {names}), "
            f"{seen}; "
            + (f"{last.name} is intact" if last is not None else "no checkpoint was written yet")
            + "; lower training.learning_rate, or look at these examples"
        )

    def _poisoned(self, running: _Running) -> list[Place]:
        """This process's examples with a loss that is no number."""
        prepared, found = running.prepared, []
        for places, logprobs in zip(prepared.places, running.logprobs, strict=True):
            counts = [
                int(
                    supervised_tokens(
                        [[place]], self.data.splits, loss_on=self.settings.loss_on
                    ).sum()
                )
                for place in places
            ]
            parts = logprobs.cpu().split(counts)
            found += [
                place
                for place, part in zip(places, parts, strict=True)
                if not part.isfinite().all()
            ]
        return found

    def _write(self, metrics: TextIO, event: Mapping[str, Any]) -> None:
        metrics.write(json.dumps(event) + "\n")
        metrics.flush()
        self._tell(event)

    @contextmanager
    def _metrics(self) -> Iterator[TextIO]:
        """metrics.jsonl, cut to where the run stands: later lines belong to a lost future."""
        if not self.processes.main:
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
            if self._stop_asked:
                raise KeyboardInterrupt
            self._stop_asked = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _without_long_collections() -> Iterator[None]:
    """Data and model stay: to look through them for garbage again and again would hold up steps."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
