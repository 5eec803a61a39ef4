"""Lanes: each has a part in hand, reads and prepares its rows ahead of the model, and writes what was answered.

A lane is a thread, or, where Python's lock would keep a card waiting, a process. It puts its rows to the model's thread
(`Inbox`) and goes on with the next ones meanwhile.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch

from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.prediction.desks import ChoiceDesk, Desk, Fit, Payload
from mtl_lora_cli.prediction.in_hand import (
    Fail,
    Idle,
    Inbox,
    Job,
    Question,
    Rows,
    answer_parts,
)
from mtl_lora_cli.prediction.inputs import Part
from mtl_lora_cli.prediction.lent import Borrowed, Lent, New, Place
from mtl_lora_cli.prediction.manifest import Done
from mtl_lora_cli.recipe.load import load_extensions_of
from mtl_lora_cli.runs.folder import RunFolder

_NICE = 5  # how far a lane stands back where cores are few

Parts = Iterator[Part]
Outbox = queue.SimpleQueue[Any]


class Start(NamedTuple):
    """To a lane's process: there are parts."""


class Want(NamedTuple):
    """From there: another part is asked for."""


class Given(NamedTuple):
    """To there: this one; None: there is none."""

    part: Part | None


class Stopped(Exception):
    """The work was given up."""


class Threads:
    """Lanes in this process.

    Args:
        job: what they work on.
        desk: of the run, for all of them.
        count: of the lanes.
        inbox: of the model's thread.
    """

    def __init__(self, job: Job, desk: Desk, count: int, inbox: Inbox) -> None:
        self._job, self._desk, self.count, self._inbox = job, desk, count, inbox
        self._stopped = threading.Event()
        self._open: set[Future[Any]] = set()
        self._threads: list[threading.Thread] = []

    def start(self, parts: Parts) -> None:
        """Work on parts that nobody else takes."""
        shared = _Shared(parts)
        self._threads = [
            threading.Thread(target=self._run, args=(shared,), daemon=True, name=f"lane {number}")
            for number in range(self.count)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, parts: _Shared) -> None:
        try:
            answer_parts(self._job, self._desk, parts, self._ask, self._inbox.put)
        except Stopped:
            pass
        except BaseException as error:
            self._inbox.put(Fail(error))
        self._inbox.put(Idle())

    def _ask(self, payload: Payload) -> Future[Any]:
        question = Question(payload, Future())
        self._open.add(question.answer)
        question.answer.add_done_callback(self._open.discard)
        if self._stopped.is_set():
            raise Stopped
        self._inbox.put(question)
        return question.answer

    def close(self) -> None:
        """End; what is in hand is given up."""
        self._stopped.set()
        while any(thread.is_alive() for thread in self._threads):
            for answer in tuple(self._open):
                with suppress(InvalidStateError):
                    answer.set_exception(Stopped())
            time.sleep(0.01)


class Processes:
    """Lanes in processes of their own, for rows of tasks with choices. They have no model.

    Args:
        job: what they work on.
        count: of the lanes.
        inbox: of the model's thread.
    """

    def __init__(self, job: Job, count: int, inbox: Inbox) -> None:
        self.count, self._inbox = count, inbox
        # A server that has loaded the libraries and has no card or thread of its own: lanes start at once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mtl_lora_cli.prediction.lane_server"])
        self._processes: list[Any] = []
        self._ends: list[Any] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_lane_process, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._ends.append(ours)

    def know(self, fit: Fit) -> None:
        """Tell all lanes, once, how rows go together: they look at no card, for that would take memory there."""
        for end in self._ends:
            end.send(fit)

    def start(self, parts: Parts) -> None:
        """Work on parts that nobody else takes."""
        shared = _Shared(parts)
        for end in self._ends:
            outbox: Outbox = queue.SimpleQueue()
            threading.Thread(target=self._run, args=(end, outbox, shared), daemon=True).start()
            threading.Thread(target=_sent, args=(end, outbox), daemon=True).start()

    def _run(self, end: Any, outbox: Outbox, parts: _Shared) -> None:
        """The half of a lane that is here: it hands over what comes from the other one."""

        def answered(answer: Future[Any]) -> None:
            if answer.exception() is None:
                outbox.put(answer.result())

        lent: list[Borrowed] = []
        try:
            outbox.put(Start())
            while not isinstance(message := end.recv(), Idle):
                if isinstance(message, New):
                    lent.append(Borrowed(end))
                elif isinstance(message, Want):
                    outbox.put(Given(next(parts, None)))
                elif isinstance(message, (Done, Fail, Rows)):
                    self._inbox.put(message)
                else:
                    assert isinstance(message, _Sent)
                    question = Question(message.passes(lent[message.number]), Future())
                    question.answer.add_done_callback(answered)
                    self._inbox.put(question)
        except (EOFError, OSError):
            self._inbox.put(
                Fail(MtlLoraError("a process that prepares rows has ended: out of memory?"))
            )
        for memory in lent:
            memory.close()
        outbox.put(None)
        self._inbox.put(Idle())

    def close(self) -> None:
        """End; what is in hand is given up."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


def _sent(end: Any, outbox: Outbox) -> None:
    """Send what is to be sent to a lane: whoever has something for it does not wait until it is looked at."""
    with suppress(OSError):  # it has ended, which `_run` is told of
        while (message := outbox.get()) is not None:
            end.send(message)


class _Shared:
    """Parts that several lanes take from."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._lock = parts, threading.Lock()

    def __iter__(self) -> _Shared:
        return self

    def __next__(self) -> Part:
        with self._lock:
            return next(self._parts)


class _Elsewhere:
    """A lane's own half: what comes from the model's process arrives in the order in which it was asked for.

    Args:
        end: of the pipe.
    """

    def __init__(self, end: Any) -> None:
        self._end = end
        self._unanswered: deque[tuple[Future[Any], Lent]] = deque()
        self._free: list[Lent] = []
        self._lent = 0
        self._given: deque[Part | None] = deque()

    def receive(self) -> None:
        """The next message."""
        message = self._end.recv()
        if isinstance(message, Given):
            self._given.append(message.part)
        else:
            answer, memory = self._unanswered.popleft()
            self._free.append(memory)
            answer.set_result(message)

    def parts(self) -> Iterator[Part]:
        """Parts that nobody else takes."""
        while True:
            self._end.send(Want())
            while not self._given:
                self.receive()
            part = self._given.popleft()
            if part is None:
                return
            yield part

    def ask(self, payload: Payload) -> Future[Any]:
        """Put passes to the model."""
        assert not callable(payload)
        if self._free:
            memory = self._free.pop()
        else:
            memory = Lent(self._end, self._lent)
            self._lent += 1
        self._end.send(_Sent.of(payload, memory))
        answer = _Answer(self.receive)
        self._unanswered.append((answer, memory))
        return answer


class _Answer(Future[Any]):
    """Received by whoever waits for it."""

    def __init__(self, receive: Callable[[], None]) -> None:
        super().__init__()
        self._receive = receive

    def result(self, timeout: float | None = None) -> Any:
        while not self.done():
            self._receive()
        return super().result()


def _lane_process(end: Any, job: Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is asked, and ends this one
    torch.set_num_threads(1)
    os.nice(_NICE)  # the thread that launches kernels gets a core whenever it wants one
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    with suppress(EOFError, BrokenPipeError):
        try:
            load_extensions_of(RunFolder(job.run).recipe)
            opened = Run(RunFolder(job.run), force=job.force)
            opened.tokenizer  # noqa: B018 - read while the model is loaded elsewhere
            desk = ChoiceDesk(opened, job.how, end.recv())
            # Thousands of encodings are alive at any time, and none is in a cycle: looking for some took a sixth.
            gc.freeze()
            gc.set_threshold(100_000, 50, 1000)
            while isinstance(end.recv(), Start):
                here = _Elsewhere(end)
                answer_parts(job, desk, here.parts(), here.ask, end.send)
                end.send(Idle())
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:
            end.send(Fail(_plain(error)))


def _plain(error: Exception) -> Exception:
    """An error that another process can read."""
    if isinstance(error, MtlLoraError):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


_FIELDS = ("input_ids", "position_ids", "task_ids", "positions", "owner", "targets")
_ARRAYS = len(_FIELDS) + 2  # of a pass: the lengths of its segments, and where they reach, too


class _Sent(NamedTuple):
    """Passes of texts on their way from a lane.

    Attributes:
        number, size: of the memory that they lie in, see `lent`.
        places: of a pass's arrays, one pass behind the other.
    """

    number: int
    size: int
    places: list[Place]

    @classmethod
    def of(cls, batches: Sequence[PackedBatch], memory: Lent) -> _Sent:
        """Written there."""
        places = memory.fill([array for batch in batches for array in _arrays(batch)])
        return cls(memory.number, memory.size, places)

    def passes(self, memory: Borrowed) -> list[PackedBatch]:
        """Read where they lie."""
        every = memory.arrays(self.places, self.size)
        return [_batch(every[n : n + _ARRAYS]) for n in range(0, len(every), _ARRAYS)]


def _arrays(batch: PackedBatch) -> list[np.ndarray]:
    reach, bounds = batch.segments.reach, batch.segments.bounds
    lengths = np.asarray([end - start for start, end in bounds])
    until = np.zeros(0, np.int32) if reach is None else reach.numpy()
    return [*(getattr(batch, name).numpy() for name in _FIELDS), lengths, until]


def _batch(arrays: list[np.ndarray]) -> PackedBatch:
    from mtl_lora_cli.engine.segments import Segments

    *fields, lengths, until = arrays
    reach = torch.from_numpy(until) if until.size else None
    named: dict[str, Any] = dict(zip(_FIELDS, map(torch.from_numpy, fields), strict=True))
    return PackedBatch(segments=Segments.build(lengths.tolist(), reach), **named)
