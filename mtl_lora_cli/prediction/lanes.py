"""Lanes: each has a part in hand, reads and prepares its rows ahead of the model, and writes what was answered.

A lane is a thread, or, where Python's lock would keep a card waiting, a process. It puts its rows to the model's thread
(`Inbox`) and goes on with the next ones meanwhile.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.prediction.desks import Asked, ChoiceDesk, Desk, Fit, How, Payload, Prediction
from mtl_lora_cli.prediction.inputs import Part
from mtl_lora_cli.prediction.manifest import Done
from mtl_lora_cli.prediction.reading import Chunk, Fault, Reading
from mtl_lora_cli.prediction.writing import PartFile
from mtl_lora_cli.recipe.load import load_extensions_of
from mtl_lora_cli.runs.atomic import file_checksum
from mtl_lora_cli.runs.folder import RunFolder

_AHEAD = 2  # chunks of a lane that wait for the model


@dataclass(frozen=True)
class Job:
    """All that is the same for all parts.

    Attributes:
        run: the run's folder.
        force: see `open_run`.
        how: what is asked.
        reading: how rows are read.
        output: the folder of the answers.
    """

    run: Path
    force: bool
    how: How
    reading: Reading
    output: Path


class Question(NamedTuple):
    """Something for the model, and where its answer goes."""

    payload: Payload
    answer: Future[Any]


class Rows(NamedTuple):
    """So many rows more are answered, of a part that is not done yet."""

    count: int


class Fail(NamedTuple):
    """A lane has met a fault."""

    error: BaseException


class Idle(NamedTuple):
    """A lane has no parts left."""


Inbox = queue.SimpleQueue[Question | Rows | Done | Fail | Idle]
Ask = Callable[[Payload], "Future[Any]"]
Parts = Iterator[Part]


class Stopped(Exception):
    """The work was given up."""


def answer_part(
    job: Job, desk: Desk, part: Part, ask: Ask, told: Callable[[int], None] = lambda rows: None
) -> Done:
    """Answer a part: its file is in its place afterwards.

    Args:
        job: what it is a part of.
        desk: of the run.
        part: some rows.
        ask: puts something to the model.
        told: is told of rows that are answered.

    Raises:
        UsageError: a row cannot be answered, and the job is not lenient.
    """
    ending = "parquet" if part.is_parquet else "jsonl"
    path = job.output / f"{part.name}.{ending}"
    kind = desk.kind if part.is_parquet else None
    waiting: deque[tuple[Chunk, Asked, Future[Any]]] = deque()
    faults: list[Fault] = []
    rows = truncated = 0

    with PartFile(path, job.reading.column, kind) as file:

        def finish() -> None:
            nonlocal rows, truncated
            chunk, asked, answer = waiting.popleft()
            predictions = asked.told(answer.result())
            file.write(chunk, predictions)
            rows += len(predictions)
            truncated += sum(map(_is_cut, predictions))
            told(len(predictions))

        for whole in job.reading.chunks(part, desk.rows):
            chunk, asked = _asked(job, desk, part, whole)
            faults += chunk.faults
            waiting.append((chunk, asked, ask(asked.payload)))
            if len(waiting) > _AHEAD:
                finish()
        while waiting:
            finish()
    return Done(
        part=part.name,
        digest=part.digest,
        file=path.relative_to(job.output).as_posix(),
        rows=rows,
        truncated=truncated,
        bytes=path.stat().st_size,
        sha256=file_checksum(path),
        bad=[fault.to_json() for fault in sorted(faults, key=lambda fault: fault.row)],
    )


def _asked(job: Job, desk: Desk, part: Part, chunk: Chunk) -> tuple[Chunk, Asked]:
    """Rows ready for the model, without those that cannot be answered where the job is lenient."""
    root = (job.reading.root / part.file).parent
    try:
        return chunk, desk.ask(chunk, part, root)
    except UsageError:
        if not job.reading.lenient:
            raise
    faults: dict[int, Fault] = {}
    for place, number in enumerate(chunk.numbers):
        alone = Chunk([chunk.rows[place]], [number], [], [])
        try:
            desk.ask(alone, part, root)
        except UsageError as error:
            faults[place] = Fault(part.file, number, error.lines[0])
    good = chunk.without(faults)
    return good, desk.ask(good, part, root)


def _is_cut(prediction: Prediction) -> bool:
    each = prediction.values() if "task" not in prediction else [prediction]
    return any(isinstance(one, dict) and "truncated" in one for one in each)


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
            while (part := parts.next()) is not None:
                done = answer_part(self._job, self._desk, part, self._ask, self._told)
                self._inbox.put(done)
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

    def _told(self, rows: int) -> None:
        self._inbox.put(Rows(rows))

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
        context.set_forkserver_preload([__name__])
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
            threading.Thread(target=self._run, args=(end, shared), daemon=True).start()

    def _run(self, end: Any, parts: _Shared) -> None:
        """The half of a lane that is here: it hands over what comes from the other one."""
        lock = threading.Lock()  # answers are sent by the model's thread

        def answered(answer: Future[Any]) -> None:
            if answer.exception() is None:
                with lock:
                    end.send(answer.result())

        try:
            while (part := parts.next()) is not None:
                with lock:
                    end.send(part)
                while not isinstance(message := end.recv(), Done):
                    if isinstance(message, (Fail, Rows)):
                        self._inbox.put(message)
                    else:
                        question = Question([_unpacked(one) for one in message], Future())
                        question.answer.add_done_callback(answered)
                        self._inbox.put(question)
                self._inbox.put(message)
        except (EOFError, OSError):
            self._inbox.put(
                Fail(MtlLoraError("a process that prepares rows has ended: out of memory?"))
            )
        self._inbox.put(Idle())

    def close(self) -> None:
        """End; what is in hand is given up."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


class _Shared:
    """Parts that several lanes take from."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._lock = parts, threading.Lock()

    def next(self) -> Part | None:
        """The next one; None: there is none."""
        with self._lock:
            return next(self._parts, None)


def _lane_process(end: Any, job: Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is asked, and ends this one
    torch.set_num_threads(1)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    unanswered: deque[Future[Any]] = deque()

    class Answer(Future[Any]):
        """The model answers in the order in which it was asked."""

        def result(self, timeout: float | None = None) -> Any:
            while not self.done():
                unanswered.popleft().set_result(end.recv())
            return super().result()

    def ask(payload: Payload) -> Future[Any]:
        assert not callable(payload)
        end.send([_packed(batch) for batch in payload])
        answer = Answer()
        unanswered.append(answer)
        return answer

    def told(rows: int) -> None:
        end.send(Rows(rows))

    with suppress(EOFError, BrokenPipeError):
        try:
            load_extensions_of(RunFolder(job.run).recipe)
            opened = Run(RunFolder(job.run), force=job.force)
            opened.tokenizer  # noqa: B018 - read while the model is loaded elsewhere
            desk = ChoiceDesk(opened, job.how, end.recv())
            while True:
                part = end.recv()
                end.send(answer_part(job, desk, part, ask, told))
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
Packed = tuple[list[Any], list[int], Any]


def _packed(batch: PackedBatch) -> Packed:
    """A batch of texts as arrays of 32 bits, which cost half as much on their way."""
    arrays = [getattr(batch, name).to(torch.int32).numpy() for name in _FIELDS]
    reach = batch.segments.reach
    lengths = [end - start for start, end in batch.segments.bounds]
    return arrays, lengths, None if reach is None else reach.numpy()


def _unpacked(sent: Packed) -> PackedBatch:
    from mtl_lora_cli.engine.segments import Segments

    arrays, lengths, reach = sent
    fields = {
        name: torch.from_numpy(array).long() for name, array in zip(_FIELDS, arrays, strict=True)
    }
    until = None if reach is None else torch.from_numpy(reach)
    return PackedBatch(segments=Segments.build(lengths, until), **fields)
