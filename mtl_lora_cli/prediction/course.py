"""Parts through one model: lanes ahead of it and behind it, and it has nothing else to do than answer."""

from __future__ import annotations

import os
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mtl_lora_cli.evaluation.choices import filled
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.protocols import CHOICES, Setting
from mtl_lora_cli.evaluation.readout import Readout
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.prediction.desks import ChoiceDesk, Desk, Fit, FreeDesk, How, MapDesk
from mtl_lora_cli.prediction.in_hand import Fail, Idle, Inbox, Job, Question, Rows
from mtl_lora_cli.prediction.inputs import Part
from mtl_lora_cli.prediction.lanes import Processes, Threads
from mtl_lora_cli.prediction.manifest import Done
from mtl_lora_cli.tasks.chosen import by_router, several_tasks

_THREADS = 2
_MOST_PROCESSES = 32
_AHEAD = 3  # passes that a card has while the oldest is read, or a part noted down


@dataclass
class _Open:
    """A question of which some passes are answered."""

    answer: Future[Any]
    left: int
    values: dict[int, np.ndarray] = field(default_factory=dict)


class Scorer:
    """The model, asked pass by pass; on a card the next one runs while the one before is read.

    Args:
        opened: the run.
    """

    def __init__(self, opened: Run) -> None:
        self._packed, self._device = opened.packed.eval(), opened.device
        self._running: deque[tuple[_Open, int, Readout]] = deque()
        self._fills = self._packed.decoder is not None and self._device.type == "cuda"

    @property
    def busy(self) -> bool:
        """Passes have been asked whose values were not read yet."""
        return bool(self._running)

    def ask(self, batches: Iterable[PackedBatch], answer: Future[Any]) -> None:
        """Ask passes; their values go to `answer`, float64 [S] each."""
        every = list(batches)
        question = _Open(answer, len(every))
        if not every:
            answer.set_result([])
        for number, batch in enumerate(every):
            self._running.append((question, number, self.begin(batch)))
            while len(self._running) > _AHEAD:
                self.read()

    def begin(self, batch: PackedBatch) -> Readout:
        """Have a pass computed."""
        moved = (filled(batch) if self._fills else batch).to(self._device)
        with torch.inference_mode(), self._packed.routed(moved):
            return Readout(self._packed(moved))

    def read(self) -> None:
        """Wait for the oldest pass."""
        question, number, values = self._running.popleft()
        question.values[number] = values.numpy()
        question.left -= 1
        if not question.left:
            question.answer.set_result([question.values[n] for n in range(len(question.values))])


class Course:
    """Answers parts of one job with one model.

    Args:
        opened: the run; its model is loaded here.
        job: what is asked, and where answers go.
        lanes: how many prepare rows; None: as many as are good.
        processes: they are processes of their own, which rows of tasks with choices can have; None: on a card.
    """

    def __init__(
        self, opened: Run, job: Job, lanes: int | None = None, *, processes: bool | None = None
    ) -> None:
        self._inbox: Inbox = queue.SimpleQueue()
        self._questions: deque[Question] = deque()
        self._scorer: Scorer | None = None
        self._lanes: Threads | Processes
        self._threads: int | None = None  # of torch, before
        scored = not opened.of_maps and of_choices(opened, job.how)
        if processes is None:
            processes = opened.device.type == "cuda"
        if processes and scored and opened.vision is None:
            count = lanes or max(1, min(_MOST_PROCESSES, _cores() - 1))
            self._lanes = Processes(job, count, self._inbox)  # they start while the model is loaded
            if opened.device.type == "cuda":
                # Lanes have the cores: what torch does here for a card would wait for threads that get none.
                self._threads = torch.get_num_threads()
                torch.set_num_threads(1)
            self._scorer = Scorer(opened)
            self._lanes.know(Fit.of(opened))
        else:
            desk = _desk(opened, job, scored)
            self._scorer = Scorer(opened) if scored else None
            self._lanes = Threads(job, desk, lanes or _THREADS, self._inbox)

    def run(
        self, parts: Iterable[Part], told: Callable[[int], None] = lambda rows: None
    ) -> Iterator[Done]:
        """Answer parts, in any order; each is given when its file lies in its place.

        Args:
            parts: those that are not done.
            told: is told of rows that are answered.

        Raises:
            UsageError: a row cannot be answered.
        """
        self._lanes.start(iter(parts))
        idle = 0
        while idle < self._lanes.count:
            message = self._next()
            if isinstance(message, Question):
                self._answer(message)
            elif isinstance(message, Done):
                yield message
            elif isinstance(message, Rows):
                told(message.number)
            elif isinstance(message, Fail):
                raise message.error
            else:
                idle += isinstance(message, Idle)

    def _next(self) -> Any:
        """What comes next, questions last: what is done is noted down, and a fault is told, before their answers.

        While nothing comes, passes that run are read.
        """
        while True:
            with suppress(queue.Empty):
                while isinstance(message := self._inbox.get_nowait(), Question):
                    self._questions.append(message)
                return message
            if self._questions:
                return self._questions.popleft()
            if self._scorer is None or not self._scorer.busy:
                break
            self._scorer.read()
        return self._inbox.get()

    def _answer(self, question: Question) -> None:
        payload = question.payload
        if not callable(payload):
            assert self._scorer is not None
            self._scorer.ask(payload, question.answer)
            return
        try:
            question.answer.set_result(payload())
        except Exception as error:  # whatever it is, it is the lane's part that it ends
            question.answer.set_exception(error)

    def close(self) -> list[Done]:
        """Give up what is in hand; parts that are done stay, also those that `run` has not given yet."""
        self._lanes.close()
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        messages = []
        with suppress(queue.Empty):
            while True:
                messages.append(self._inbox.get_nowait())
        return [message for message in messages if isinstance(message, Done)]


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def of_choices(opened: Run, how: How) -> bool:
    """Whether each row is answered by one task, and by its choices."""
    names = [task.name for task in opened.tasks]
    if by_router(names, how.task, how.task_column) or several_tasks(
        names, how.task, how.task_column
    ):
        return False
    setting = Setting()
    named = [task for task in opened.tasks if how.task in (None, task.name)]
    return all(setting.protocol_of(task) == CHOICES for task in named)


def _desk(opened: Run, job: Job, scored: bool) -> Desk:
    if opened.of_maps:
        return MapDesk(opened, job.how, job.output)
    if scored:
        return ChoiceDesk(opened, job.how, Fit.of(opened))
    return FreeDesk(opened, job.how)
