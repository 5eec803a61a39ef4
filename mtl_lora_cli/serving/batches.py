"""Requests of any tasks, put to the model together.

One thread has the model. While it answers, further requests wait; then all that wait, up to so many rows, are
answered as one. Nobody waits for others to come.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread

from mtl_lora_cli.evaluation.predict import ROWS, Prediction, Predictor, Rendered


class Full(Exception):
    """So many rows wait that a request is not taken."""


@dataclass(frozen=True)
class Answered:
    """What became of a request.

    Attributes:
        predictions: of its rows.
        waited, computed: seconds before the model began with it, and until it had answered.
        rows: that were answered together.
    """

    predictions: list[Prediction]
    waited: float
    computed: float
    rows: int


@dataclass
class _Job:
    rendered: Rendered
    came: float
    future: Future[Answered] = field(default_factory=Future)

    @property
    def rows(self) -> int:
        return len(self.rendered.part)


class Batches:
    """See the module.

    Args:
        predictor: has the model.
        most: rows that may wait.
        told: is told of every batch: its rows, and the seconds that it took.
    """

    def __init__(
        self,
        predictor: Predictor,
        most: int,
        told: Callable[[int, float], None] = lambda rows, seconds: None,
    ) -> None:
        self._predictor, self._most, self._told = predictor, most, told
        self._waiting: deque[_Job] = deque()
        self._rows = 0
        self._changed = Condition()
        self._closed = False
        self._thread = Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return self._rows

    def put(self, rendered: Rendered) -> Future[Answered]:
        """Ask; the future has the answer, or the UsageError that the request met.

        Raises:
            Full: too many rows wait.
        """
        job = _Job(rendered, time.monotonic())
        with self._changed:
            if self._closed or self._rows + job.rows > self._most:
                raise Full
            self._waiting.append(job)
            self._rows += job.rows
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Answer what waits, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._next():
            started = time.monotonic()
            self._answer(jobs, started)
            self._told(sum(job.rows for job in jobs), time.monotonic() - started)

    def _next(self) -> list[_Job]:
        """Those that wait, as many as go together; none: it is over."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            jobs: list[_Job] = []
            rows = 0
            while self._waiting and (not jobs or rows + self._waiting[0].rows <= ROWS):
                jobs.append(self._waiting.popleft())
                rows += jobs[-1].rows
            self._rows -= rows
            return jobs

    def _answer(self, jobs: Sequence[_Job], started: float) -> None:
        """Together; where that fails each alone, so that one request's fault is no other's."""
        try:
            found = self._predictor.answer_all([job.rendered for job in jobs])
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._answer([job], started)
                return
            jobs[0].future.set_exception(error)  # whatever it is: the next request is answered
            return
        seconds = time.monotonic() - started
        rows = sum(job.rows for job in jobs)
        for job, predictions in zip(jobs, found, strict=True):
            job.future.set_result(Answered(predictions, started - job.came, seconds, rows))
