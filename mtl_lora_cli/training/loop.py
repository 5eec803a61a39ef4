"""The training loop: when a step is taken, written down, looked at and saved.

`Stepper` takes the steps, `Journal` says what they did, observers look at some of them.
"""

from __future__ import annotations

import gc
import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mtl_lora_cli.adapters.files import state_of
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.machine.processes import Interrupted
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.unread import unread_layers
from mtl_lora_cli.training.best import Best, Mark, best_after
from mtl_lora_cli.training.checkpoints import (
    Position,
    checkpoint_of,
    is_whole,
    load_checkpoint,
    newest_checkpoint,
    random_states,
)
from mtl_lora_cli.training.drawn import Draw, Drawn, sizes_of
from mtl_lora_cli.training.followers import Balancing, followers, pcgrad, require_followed
from mtl_lora_cli.training.journal import Journal, step_event
from mtl_lora_cli.training.observers import Observer, due
from mtl_lora_cli.training.parts import parameter_groups
from mtl_lora_cli.training.poison import no_number
from mtl_lora_cli.training.prepared import ReadyRun
from mtl_lora_cli.training.saving import Saver
from mtl_lora_cli.training.schedule import learning_rate_factor
from mtl_lora_cli.training.step import Running, StepClock, Stepper
from mtl_lora_cli.training.surgery import Surgery
from mtl_lora_cli.training.unreached import Unreached


class Trainer:
    """Trains the adapter of one run.

    The loss of a step is Σ_t w_t Σ_i ℓ_i / S with the step's S units (supervised tokens, of text) over
    all rows, passes and processes, and w_t the task's `loss_weight`.

    Args:
        ready: the run, its model built.
        observers: look at some of its steps.

    Attributes:
        position: where the run stands.
        stepper: takes its steps.
        saver: writes its checkpoints, in the process that writes.
    """

    def __init__(self, ready: ReadyRun, observers: Sequence[Observer] = ()) -> None:
        prepared = ready.prepared
        self._ready, self._prepared = ready, prepared
        self.run, self.host, self.adapter = ready.run, ready.host, ready.adapter
        self.settings, self.data = prepared.recipe.training, prepared.data
        self.processes, self.total_steps = prepared.processes, prepared.total_steps
        # Counted before weights are cut into parts.
        self._floor = self.host.floor(self.processes.count)
        self._following, more = followers(ready)
        balance = next((one.factors for one in self._following if isinstance(one, Balancing)), None)
        operated = pcgrad(self.settings)
        self._draw = Draw(self.data, self.settings, self.processes, balance=balance, apart=operated)
        self.stepper: Stepper[Drawn] = Stepper(
            self.host,
            self.adapter,
            self._draw,
            total=self.total_steps,
            groups=parameter_groups(self.adapter, self.settings),
            max_norm=self.settings.max_gradient_norm,
            clipping=self.settings.clipping,
            sizes=sizes_of(
                self.data,
                self.settings,
                self.processes,
                captured=self.adapter.device.type == "cuda",
            ),
            processes=self.processes,
            zero=ready.zero,
            surgery=Surgery(self.adapter, self.settings.seed, self.processes) if operated else None,
        )
        self._unreached = self._looking_for_silence()
        self._observers = (*observers, *more, self._unreached)
        self._clock = StepClock(self.stepper.mark)
        self.saver = Saver(
            self.run.checkpoints, self.settings.keep_checkpoints, self.adapter.device
        )
        self.position = Position(step=0, metrics_bytes=0, seconds=0.0, tokens=0)
        self._stop_asked = False  # of this process
        self._stop_agreed = False  # all know, since the same step

    def _looking_for_silence(self) -> Unreached:
        """Who looks whether all of the adapter learns."""
        names = [task.name for task in self.data.tasks]
        text = self.host if isinstance(self.host, PackedModel) else None
        known = [] if text is None else unread_layers(text.model, self.adapter.layers)
        return Unreached(self.adapter, self.stepper.update, names, self.total_steps, known)

    def resume(self, checkpoint: Path) -> Best | None:
        """Go back to a checkpoint; metrics written after it are cut off.

        Returns:
            The best look so far, where it cannot count any more because its checkpoint is damaged or
            gone.
        """
        position = load_checkpoint(
            checkpoint, self.adapter, self.stepper.update, self.processes.rank, self.settings.seed
        )
        validation = self.settings.validation
        best = position.best if validation is not None and validation.best is not None else None
        there = best is not None and is_whole(checkpoint_of(self.run.checkpoints, best.step))
        kept = self.processes.same(best if there else None)
        for one in self._following:
            one.restore(require_followed(position.following, one.name, checkpoint))
        self.position = replace(position, best=kept)
        for event in self.run.events():
            if event.get("step", math.inf) <= position.step:
                self._unreached.hear(event)
        return best if kept is None else None

    @property
    def settled(self) -> bool:
        """Whether as many looks as the recipe has patience for were no better than the best one."""
        best, validation = self.position.best, self.settings.validation
        patience = None if validation is None else validation.patience
        return best is not None and patience is not None and best.waited >= patience

    def train(self, journal: Journal) -> None:
        """Run to the end, or until nothing gets better: see `settled`.

        Raises:
            Interrupted: the user stopped it; a checkpoint of the last whole step was saved.
            MtlLoraError: the loss is no longer a finite number.
            OSError: a checkpoint could not be written.
        """
        self.host.train()
        with (
            _without_long_collections(),
            journal.opened(self.position.metrics_bytes),
            self._signals(),
            self.saver.open(),
        ):
            self._clock.restart()
            if self.position.step == 0:
                self._look([one for one in self._observers if one.at_start], 0, journal)
            running: Running[Drawn] | None = None
            for step in range(self.position.step, self.total_steps):
                if self.settled:
                    break
                try:
                    running = self._take(step, running, journal)
                except UsageError as error:  # of the rows of a stream
                    raise self._kept(error, running, journal) from None

    def _kept(
        self, error: UsageError, running: Running[Drawn] | None, journal: Journal
    ) -> UsageError:
        """The error with how to go on from what was learned so far, which one process alone can save."""
        if self.processes.count == 1:
            if running is not None:
                self._finish(running, journal)
            step = self.position.step
            if step and not is_whole(checkpoint_of(self.run.checkpoints, step)):
                self._save()
            self.saver.wait()
        last = newest_checkpoint(self.run.checkpoints)
        if last is None:
            return error
        return UsageError(
            f"{error.lines[0]}; {last.name} is saved: go on with mtl-lora train --resume --run {self.run.path}"
        )

    def _take(
        self, step: int, running: Running[Drawn] | None, journal: Journal
    ) -> Running[Drawn] | None:
        """One step. A card works on it when this returns, unless somebody looks at it or it is saved.

        Args:
            step: counted from 0.
            running: the one before, where it is not written down yet.
            journal: where that is done.
        """
        self.saver.check()
        looking = due(self._observers, step + 1, self.total_steps)
        before = [one for one in looking if one.before_update]
        after = [one for one in looking if not one.before_update]
        if before and running is not None:
            self._finish(running, journal)
            running = None
        self._look(before, step + 1, journal)
        launched = self.stepper.launch(step, self._factor(step), float(self._stop_asked))
        if running is not None:  # only now: the card has the next step to work on
            self._finish(running, journal)
        last = step + 1 == self.total_steps
        every = self.settings.checkpoint_every
        saving = last or bool(every and (step + 1) % every == 0)
        if not (saving or after or self._stopping) and self.stepper.runs_ahead:
            return launched
        self._finish(launched, journal)
        self._look(after, step + 1, journal)
        best = self.position.best
        last = last or self.settled
        saving = saving or last or (best is not None and best.step == step + 1)
        if saving or self._stopping:
            self._save()
            if self._stopping and not last:
                self.saver.wait()
                self.processes.wait()  # a launcher ends them all when one has left
                raise Interrupted(
                    f"stopped after step {step + 1} and saved; go on with: "
                    f"mtl-lora train --resume --run {self.run.path}"
                )
        return None

    @property
    def _stopping(self) -> bool:
        """Whether to stop after this step: alone at once, with others when all know."""
        return self._stop_agreed or (self.processes.count == 1 and self._stop_asked)

    def _factor(self, step: int) -> float:
        """Of the peak learning rates, at a step counted from 0."""
        settings = self.settings
        return learning_rate_factor(step, self.total_steps, settings.warmup, settings.schedule)

    def _look(self, observers: Sequence[Observer], step: int, journal: Journal) -> None:
        """Let them look while no step is running; the time that they take is no step's."""
        for observer in observers:
            seen = observer.look(step)
            if seen is None:
                continue
            journal.look(seen.event, seen.line)
            if seen.mark is not None:
                self._judge(seen.mark, step, journal)
        if observers:
            self.position = replace(self.position, metrics_bytes=journal.length)
            self._clock.restart()

    def _judge(self, mark: Mark, step: int, journal: Journal) -> None:
        """Remember a look that is the best so far."""
        best = best_after(self.position.best, mark, step)
        self.position = replace(self.position, best=best)
        if best is not None and best.step == step:
            journal.look(best.event, f"best so far: {best}")

    def _finish(self, running: Running[Drawn], journal: Journal) -> None:
        """Wait for a step, look at it, and write down what it did."""
        *task_loss, asked = running.losses.tolist()
        loss = torch.tensor(task_loss, dtype=torch.float64)
        self._stop_agreed = self._stop_agreed or asked > 0
        norm = float(running.norm)
        if not (math.isfinite(float(loss.sum())) and math.isfinite(norm)):
            raise MtlLoraError(self._no_number(running))
        drawn, seconds = running.planned, self._clock.lap(running.end)
        event = step_event(
            drawn,
            [task.name for task in self.data.tasks],
            loss,
            rate=self.settings.learning_rate * self._factor(drawn.number),
            norm=norm,
            seconds=seconds,
        )
        if self._floor is not None:
            supervised_share = event["supervised"] / event["tokens"]
            event["floor_share"] = self._floor.share(event["tokens_per_second"], supervised_share)
        journal.step(event)
        self._unreached.hear(event)
        units = drawn.supervised.tolist()
        for one in self._following:
            seen = one.observe(drawn.number, task_loss, units)
            if seen is not None:
                journal.look(seen.event, seen.line)
        self.position = replace(
            self.position,
            step=drawn.number + 1,
            metrics_bytes=journal.length,
            seconds=self.position.seconds + seconds,
            tokens=self.position.tokens + event["tokens"],
        )

    def _no_number(self, running: Running[Drawn]) -> str:
        self.saver.join()
        self.processes.wait()  # all are here, and name the same one
        last = newest_checkpoint(self.run.checkpoints)
        return no_number(
            running,
            self._draw,
            self.data.tasks,
            self._prepared.where,
            self.processes,
            None if last is None else last.name,
        )

    def _save(self) -> None:
        """Rank 0 writes; what is cut into parts, and everybody's random states, come to it."""
        if self._following:
            followed = {one.name: one.state() for one in self._following}
            self.position = replace(self.position, following=followed)
        moments = self.stepper.update.state(self.adapter.trained())
        states = self.processes.gather(random_states())
        if self.processes.main:
            adapter = state_of(self.adapter, self._prepared.base.identity())
            self.saver.save(self.position, adapter, moments, states)

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
