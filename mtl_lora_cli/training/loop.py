"""The training loop: packed rows in, a trained adapter and a line a step out."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.data.collate import training_batch
from mtl_lora_cli.data.mixture import Place
from mtl_lora_cli.data.prepare import TrainingData
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.recipe.schema import Training
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.checkpoints import Position, load_checkpoint, save_checkpoint
from mtl_lora_cli.training.progress import TrainingProgress
from mtl_lora_cli.training.schedule import learning_rate_factor


class Interrupted(KeyboardInterrupt):
    """The user asked to stop; the run was saved."""


@dataclass
class _StepSums:
    """Sums over one optimiser step, per task."""

    loss: Tensor  # [T] float64
    supervised: Tensor  # [T] int64
    tokens: int = 0


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
    ) -> None:
        self.accelerator = accelerator
        self.adapter = adapter
        self.data = data
        self.settings = settings
        self.run = run
        self.base_model = base_model
        self.total_steps = total_steps
        optimizer = torch.optim.AdamW(
            list(adapter.tensors().values()),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.packed = packed
        self.model, self.optimizer = accelerator.prepare(packed, optimizer)
        self.position = Position(step=0, metrics_bytes=0, seconds=0.0, tokens=0)
        self._weights = torch.tensor([task.loss_weight for task in data.tasks])
        self._stop = False

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
            before, started = self.position.seconds, time.monotonic()
            for step in range(self.position.step, self.total_steps):
                event = self._step(step)
                seconds = before + time.monotonic() - started
                tokens = self.position.tokens + event["tokens"]
                event["tokens_per_second"] = event["tokens"] / max(1e-9, event["seconds"])
                metrics.write(json.dumps(event) + "\n")
                metrics.flush()
                self.position = Position(step + 1, metrics.tell(), seconds, tokens)
                progress.update(event)
                every = self.settings.checkpoint_every
                last = step + 1 == self.total_steps
                if self._stop or last or (every and (step + 1) % every == 0):
                    self._save()
                if self._stop and not last:
                    raise Interrupted(
                        f"stopped after step {step + 1} and saved; go on with: "
                        f"mtl-lora train --resume --run {self.run.path}"
                    )

    def _step(self, step: int) -> dict[str, Any]:
        started = time.monotonic()
        epoch, rows = self.data.mixture.step(step)
        factor = learning_rate_factor(
            step, self.total_steps, self.settings.warmup, self.settings.schedule
        )
        rate = self.settings.learning_rate * factor
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums = self._accumulate(rows)
        norm = self.accelerator.clip_grad_norm_(
            list(self.adapter.tensors().values()), self.settings.max_gradient_norm
        )
        if not (math.isfinite(float(sums.loss.sum())) and math.isfinite(float(norm))):
            names = [self.data.tasks[task].name for task in sorted({t for r in rows for t, _ in r})]
            raise MtlLoraError(
                f"the loss is no longer a finite number at step {step + 1} (tasks {', '.join(names)}); "
                f"checkpoints before it are intact; lower training.learning_rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self._event(step, epoch, rate, float(norm), sums, time.monotonic() - started)

    def _accumulate(self, rows: list[list[Place]]) -> _StepSums:
        """Forward and backward over this process's rows of one step."""
        mine = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        size = self.settings.rows_per_pass
        batches = [
            training_batch(mine[i : i + size], self.data.splits, loss_on=self.settings.loss_on)
            for i in range(0, len(mine), size)
        ]
        tasks = len(self.data.tasks)
        owners = [batch.task_ids.view(-1)[batch.positions[batch.owner]] for batch in batches]
        supervised = sum(
            (torch.bincount(owner, minlength=tasks) for owner in owners),
            torch.zeros(tasks, dtype=torch.long),
        )
        supervised = self.accelerator.reduce(supervised.to(self.accelerator.device)).cpu()
        total = int(supervised.sum())
        loss = torch.zeros(tasks, dtype=torch.float64, device=self.accelerator.device)
        for number, (batch, owner) in enumerate(zip(batches, owners, strict=True)):
            moved = batch.to(self.accelerator.device)
            weights = self._weights[owner].to(self.accelerator.device)
            last = number + 1 == len(batches)
            with self._synchronised(last), self.packed.routed(moved):
                logprobs = self.model(moved)
                # Gradients are averaged over processes, the loss is a sum over them.
                scale = self.accelerator.num_processes / total
                self.accelerator.backward(-(logprobs * weights).sum() * scale)
            loss.index_add_(0, owner.to(loss.device), -logprobs.detach().double())
        tokens = sum(batch.input_ids.numel() for batch in batches)
        return _StepSums(self.accelerator.reduce(loss).cpu(), supervised, tokens)

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        if last:
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield

    def _event(
        self, step: int, epoch: int, rate: float, norm: float, sums: _StepSums, seconds: float
    ) -> dict[str, Any]:
        names = [task.name for task in self.data.tasks]
        weighted = float((sums.loss * self._weights.double()).sum())
        event: dict[str, Any] = {
            "event": "step",
            "step": step + 1,
            "epoch": epoch,
            "loss": weighted / int(sums.supervised.sum()),
            "task_loss": {
                name: float(loss) / int(count)
                for name, loss, count in zip(names, sums.loss, sums.supervised, strict=True)
                if count
            },
            "supervised": int(sums.supervised.sum()),
            "tokens": sums.tokens,
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
