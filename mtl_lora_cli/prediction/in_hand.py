"""Parts in hand: read, prepared ahead of the model, and written as answers come."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mtl_lora_cli.errors import NoNumbersError, UsageError
from mtl_lora_cli.prediction.desks import Asked, Desk, How, Payload, Prediction
from mtl_lora_cli.prediction.inputs import Part
from mtl_lora_cli.prediction.manifest import Done
from mtl_lora_cli.prediction.reading import Chunk, Fault, Reading
from mtl_lora_cli.prediction.writing import PartFile
from mtl_lora_cli.runs.atomic import file_checksum

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
    """So many rows more are answered."""

    number: int


class Fail(NamedTuple):
    """A lane has met a fault."""

    error: BaseException


class Idle(NamedTuple):
    """A lane has no parts left."""


Inbox = queue.SimpleQueue[Question | Rows | Done | Fail | Idle]
Ask = Callable[[Payload], "Future[Any]"]


class _Open:
    """A part in hand.

    Args:
        job: what it is a part of.
        desk: of the run.
        part: some rows.
    """

    def __init__(self, job: Job, desk: Desk, part: Part) -> None:
        self.part = part
        ending = "parquet" if part.is_parquet else "jsonl"
        self._path = job.output / f"{part.name}.{ending}"
        self._place = self._path.relative_to(job.output).as_posix()
        kind = desk.kind if part.is_parquet else None
        self.file = PartFile(self._path, job.reading.column, kind)
        self._faults: list[Fault] = []
        self._rows = self._truncated = 0

    def write(self, chunk: Chunk, predictions: Sequence[Prediction]) -> None:
        """Rows, and the answers to them."""
        self.file.write(chunk, predictions)
        self._faults += chunk.faults
        self._rows += len(predictions)
        self._truncated += sum(map(_is_cut, predictions))

    def close(self) -> Done:
        """All rows are written."""
        self.file.close()
        return Done(
            part=self.part.name,
            digest=self.part.digest,
            file=self._place,
            rows=self._rows,
            truncated=self._truncated,
            bytes=self._path.stat().st_size,
            sha256=file_checksum(self._path),
            bad=[fault.to_json() for fault in sorted(self._faults, key=lambda fault: fault.row)],
        )


class _Waiting(NamedTuple):
    """Rows that the model has not answered yet; those of a part end with `last`."""

    part: _Open
    chunk: Chunk
    asked: Asked
    answer: Future[Any]
    last: bool


def answer_parts(
    job: Job, desk: Desk, parts: Iterable[Part], ask: Ask, put: Callable[[Done | Rows], None]
) -> None:
    """Answer parts: the next one is begun while the last rows of the one before wait for the model.

    Args:
        job: what they are parts of.
        desk: of the run.
        parts: one after another, as they are asked for.
        ask: puts something to the model.
        put: is told of parts that are done, and of rows on the way.

    Raises:
        UsageError: a row cannot be answered, and the job is not lenient; parts in hand leave nothing.
    """
    waiting: deque[_Waiting] = deque()
    in_hand: list[_Open] = []

    def finish() -> None:
        one = waiting.popleft()
        try:
            chunk, predictions = one.chunk, one.asked.told(one.answer.result())
        except NoNumbersError:
            if not job.reading.lenient:
                raise
            chunk, predictions = _one_by_one(job, desk, one, ask)
        one.part.write(chunk, predictions)
        put(Rows(len(predictions)))
        if one.last:
            in_hand.remove(one.part)
            put(one.part.close())

    try:
        for part in parts:
            opened = _Open(job, desk, part)
            in_hand.append(opened)
            for whole, last in _with_last(job.reading.chunks(part, desk.rows)):
                chunk, asked = _asked(job, desk, part, whole)
                waiting.append(_Waiting(opened, chunk, asked, ask(asked.payload), last))
                while len(waiting) > _AHEAD:
                    finish()
        while waiting:
            finish()
    except UsageError:
        while waiting:  # parts before it are done yet
            finish()
        raise
    finally:
        for opened in in_hand:
            opened.file.drop()


def _with_last(chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, bool]]:
    """Whether each is the last one: known once the rest of the part was found to be what was planned."""
    before: Chunk | None = None
    for chunk in chunks:
        if before is not None:
            yield before, False
        before = chunk
    if before is not None:
        yield before, True


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
        try:
            desk.ask(chunk.alone(place), part, root)
        except UsageError as error:
            faults[place] = Fault(part.file, number, error.lines[0])
    good = chunk.without(faults)
    return good, desk.ask(good, part, root)


def _one_by_one(
    job: Job, desk: Desk, one: _Waiting, ask: Callable[[Payload], Future[Any]]
) -> tuple[Chunk, list[Prediction]]:
    """Rows without those that the model finds no numbers for, and the answers."""
    part = one.part.part
    root = (job.reading.root / part.file).parent
    faults: dict[int, Fault] = {}
    predictions: list[Prediction] = []
    for place, number in enumerate(one.chunk.numbers):
        asked = desk.ask(one.chunk.alone(place), part, root)
        try:
            predictions += asked.told(ask(asked.payload).result())
        except NoNumbersError as error:
            faults[place] = Fault(part.file, number, error.lines[0])
    return one.chunk.without(faults), predictions


def _is_cut(prediction: Prediction) -> bool:
    each = prediction.values() if "task" not in prediction else [prediction]
    return any(isinstance(one, dict) and "truncated" in one for one in each)
