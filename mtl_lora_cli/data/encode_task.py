"""A task's rows become tokens, piece by piece: by all cores, in as much memory as a few pieces take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mtl_lora_cli.data import cache
from mtl_lora_cli.data.answers import require_answers
from mtl_lora_cli.data.audit import Audit, audit, leaked
from mtl_lora_cli.data.control_tokens import Brought
from mtl_lora_cli.data.encoded import (
    EncodedSplit,
    Overflow,
    Piece,
    encode_piece,
    require_kept,
    starts_of,
)
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.part_stream import droppable
from mtl_lora_cli.data.parts import Parts
from mtl_lora_cli.data.pictured import require_readable, shown_twice
from mtl_lora_cli.data.seen import Seen, counted, seen_of, together
from mtl_lora_cli.data.sources import stream_of
from mtl_lora_cli.data.task_rows import TaskRows, held_out_rows, task_rows
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.machine.pool import in_pieces
from mtl_lora_cli.pictures.shown import Picture
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.tasks.noticed import slips
from mtl_lora_cli.tasks.rendering import same_choices
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.visible import tell

_PIECE = 2048  # rows
_FIRST = 64  # rows whose fields are known for a template's slips
MANY_ROWS = 8 * _PIECE  # rows from which on processes are started for them
_SILENT = 10.0  # seconds between two lines about how far it is
_HASHES = ("traces", "asked", "said")


@dataclass
class _Learned:
    """What comes of a piece of training rows; also sent from one process to another."""

    arrays: dict[str, np.ndarray]
    piece: Piece
    seen: Seen
    brought: Brought
    faults: list[str] = field(default_factory=list)


@dataclass
class _Whole:
    """What all pieces come to, but for their arrays."""

    parts: Parts
    seen: Seen | None = None
    brought: Brought = field(default_factory=Brought)
    kept: int = 0
    dropped: int = 0
    truncated: int = 0
    turns: int = 0
    too_long: int = 0
    first: tuple[str, int] | None = None
    faulty: int = 0
    fault: str = ""
    pictures: list[tuple[Picture, ...]] = field(default_factory=list)

    def add(self, one: _Learned) -> None:
        for name, values in one.arrays.items():
            self.parts.add(name, values)
        for name in _HASHES:
            self.parts.add(name, getattr(one.seen, name))
        self.seen = one.seen if self.seen is None else counted(self.seen, one.seen)
        self.brought += one.brought
        piece = one.piece
        self.kept += len(one.arrays["lengths"])
        self.dropped, self.truncated = (
            self.dropped + piece.dropped,
            self.truncated + piece.truncated,
        )
        self.turns, self.too_long = self.turns + piece.turns, self.too_long + len(piece.too_long)
        self.first = self.first or next(iter(piece.too_long), None)
        self.faulty += len(one.faults)
        self.fault = self.fault or next(iter(one.faults), "")
        self.pictures += piece.pictures

    def left_out(self, rows: int) -> list[str]:
        """What is said of rows that could not be learned.

        Raises:
            UsageError: these are most of them.
        """
        if 2 * self.faulty > rows:
            raise UsageError(
                f"{self.fault} ({self.faulty:,} of {rows:,} rows cannot be learned; broken_rows: drop leaves out some)"
            )
        if not self.faulty:
            return []
        return [
            f"{self.faulty:,} of {rows:,} rows are left out (broken_rows: drop), the first is {self.fault}"
        ]

    def split(self, task: Task, encoder: Encoder, rows: int) -> EncodedSplit:
        shows = bool(task.template.images)
        return EncodedSplit(
            tokens=self.parts.array("tokens"),
            starts=starts_of(self.parts.array("lengths")),
            prompt_lengths=self.parts.array("prompt_lengths"),
            dropped=self.dropped,
            truncated=self.truncated,
            rows=rows,
            mask=self.parts.array("mask") if task.template.conversation is not None else None,
            turns=self.turns,
            pictures=tuple(self.pictures) if shows else None,
            picture_token=encoder.eyes.vision.token_id if shows else None,
        )


def encode_task(task: Task, recipe: Recipe, encoder: Encoder, limit: int) -> cache.Stored:
    """Encode and audit a task's training rows, and look at those that they will be held against.

    Args:
        task: bound; its source has a training split.
        recipe: the run's.
        encoder: tokenises.
        limit: tokens that an example may have.

    Raises:
        UsageError: data that cannot be learned from, naming file and line.
    """
    training = recipe.training
    rows = task_rows(task, "train", at_most=task.max_examples, seed=training.seed)
    assert rows is not None, "it has a fingerprint"
    whole = _Whole(Parts(cache.folder()))
    learn = partial(_learned, rows, encoder, limit, training.on_overflow)
    # The first piece here: what the processes need to know, and what is wrong with most rows, shows in it.
    whole.add(learn(0, min(_PIECE, len(rows))))
    held, beside = _beside(task, encoder)
    for one in _pieces(learn, rows, _PIECE):
        whole.add(one)
    left_out = whole.left_out(len(rows))
    require_kept(
        task.name,
        limit,
        rows=len(rows),
        kept=whole.kept,
        too_long=whole.too_long,
        first=whole.first,
    )
    assert whole.seen is not None
    traces = whole.parts.array("traces").reshape(-1, 2)
    known = (_known(traces[:, 0]), _known(traces[:, 1]))
    read = {one.split: seen for one, seen in (held, beside) if one is not None and seen is not None}
    whole_set = not task.source.stream  # of a stream this is the first window
    noticed = audit(
        whole.seen,
        whole.parts.array("asked"),
        whole.parts.array("said"),
        held[1],
        None if held[0] is None else held[0].split,
        leaks=[leaked(split, seen.traces, known) for split, seen in read.items()],
        odd=[*whole.seen.odd, *(one for seen in read.values() for one in seen.odd)],
        same_answers=whole_set
        and task.template.scoring == "argmax"
        and same_choices(task.template),
        one_answer=whole_set and task.template.conversation is None,
        cut_prompts=whole.truncated,
        dropped=whole.dropped,
        turns=whole.turns,
        notes=[
            *left_out,
            *encoder.notes_on(task, whole.brought),
            *slips(task.template, _fields(rows)),
            *(note for one in (rows, held[0], beside[0]) if one for note in one.found.notes),
            *shown_twice(whole.seen.pictures, {split: one.pictures for split, one in read.items()}),
        ],
    )
    encoded = whole.split(task, encoder, len(rows))
    return encoded, noticed, cache.Traces(known, {n: one.traces for n, one in read.items()})


def _fields(rows: TaskRows) -> set[str]:
    """What the first rows have, but for those that cannot be read, which a stream leaves out."""
    found: set[str] = set()
    for number in rows.numbers[:_FIRST].tolist():
        with suppress(UsageError):
            found.update(rows.found.some(np.asarray([number]))[0])
    return found


def encode_window(
    task: Task, recipe: Recipe, encoder: Encoder, limit: int, window: int
) -> cache.Stored:
    """Encode a later window of a stream; it is held against nothing.

    Args:
        task, recipe, encoder, limit: as of `encode_task`.
        window: its number, from 1 on.

    Raises:
        UsageError: likewise.
    """
    source = task.source
    stream = stream_of(source, base=Path(), task=task.name)
    found = stream.rows(window * source.window, source.window)
    rows = TaskRows(task, "train", found, np.arange(len(found.rows)), lenient=source.drops_rows)
    whole = _Whole(Parts(cache.folder()))
    learn = partial(_learned, rows, encoder, limit, recipe.training.on_overflow)
    for one in _pieces(learn, rows, 0):
        whole.add(one)
    for line in whole.left_out(len(rows)):
        tell(f"note: {task.name}, rows {window * source.window:,} and on: {line}")
    many, first = whole.too_long, whole.first
    require_kept(task.name, limit, rows=len(rows), kept=whole.kept, too_long=many, first=first)
    nothing = np.empty(0, np.uint64)
    traces = cache.Traces((nothing, nothing), {})
    return whole.split(task, encoder, len(rows)), Audit(len(rows)), traces


def _learned(
    rows: TaskRows, encoder: Encoder, limit: int, on_overflow: Overflow, first: int, last: int
) -> _Learned:
    """A piece of the training rows; of a stream that drops them without those that cannot be learned."""
    try:
        with droppable(drops=rows.lenient or not rows.task.source.stream):
            return _every_row(rows, encoder, limit, on_overflow, first, last)
    except UsageError:
        if not rows.lenient:
            raise
    good, places, faults = [], [], []
    for number in rows.numbers[first:last].tolist():
        where = rows.found.where(number)
        try:
            (row,) = rows.found.some(np.asarray([number]))
            _every_row(_held(rows, [row], [where]), encoder, limit, on_overflow, 0, 1)
        except UsageError as error:
            faults.append(error.lines[0])
        else:
            good.append(row)
            places.append(where)
    kept = _held(rows, good, places)
    return replace(_every_row(kept, encoder, limit, on_overflow, 0, len(good)), faults=faults)


def _held(rows: TaskRows, some: list[Any], places: list[str]) -> TaskRows:
    """Some of the rows, which have been read."""
    found = replace(rows.found, rows=some, places=places)
    return replace(rows, found=found, numbers=np.arange(len(some)))


def _every_row(
    rows: TaskRows, encoder: Encoder, limit: int, on_overflow: Overflow, first: int, last: int
) -> _Learned:
    task, examples = rows.task, rows.piece(first, last)
    require_readable(examples.examples)
    require_answers(task, examples.examples, examples.wheres, encoder)
    marked = encoder.control_tokens.mark(task, examples)
    piece = encode_piece(
        marked.examples,
        examples.wheres,
        encoder,
        task=task.name,
        limit=limit,
        on_overflow=on_overflow,
    )
    arrays = piece.arrays()
    if task.template.conversation is None:
        del arrays["mask"]
    return _Learned(
        arrays,
        replace(
            piece, tokens=[], masks=[], pictures=piece.pictures if task.template.images else []
        ),
        seen_of(rows.split, examples.examples, examples.wheres),
        encoder.brought(marked)
        if first == 0
        else replace(encoder.brought(marked), drops_reasoning=False),
    )


Held = tuple[TaskRows | None, Seen | None]


def _beside(task: Task, encoder: Encoder) -> tuple[Held, Held]:
    """What the task is evaluated on, and the validation rows beside a test split."""
    held = held_out_rows(task)
    if held is None:
        return (None, None), (None, None)
    seen = _looked_at(held, encoder)
    # Looked at for leaks, too: `training.validation.best` picks by its rows.
    beside = task_rows(task, "validation", labelled=False) if held.split == "test" else None
    return (held, seen), (beside, None if beside is None else _looked_at(beside, None))


def _looked_at(rows: TaskRows, encoder: Encoder | None) -> Seen:
    """Held-out rows; with an encoder their answers are looked at, too."""

    def look(first: int, last: int) -> Seen:
        examples = rows.piece(first, last)
        if encoder is not None:
            require_readable(examples.examples)
            require_answers(rows.task, examples.examples, examples.wheres, encoder)
        return seen_of(rows.split, examples.examples, examples.wheres)

    if not len(rows):
        return look(0, 0)
    processes = None if len(rows) >= MANY_ROWS else 1
    return together(list(in_pieces(look, len(rows), _PIECE, processes=processes)))


def _pieces(learn: partial[_Learned], rows: TaskRows, begin: int) -> Iterator[_Learned]:
    """All pieces from a row on; now and then it is said how far they are."""
    many = len(rows) >= MANY_ROWS
    left = max(0, len(rows) - begin)
    started = told = time.monotonic()

    def shifted(first: int, last: int) -> _Learned:
        return learn(begin + first, begin + last)

    done = 0
    for one in in_pieces(shifted, left, _PIECE, processes=None if many else 1):
        yield one
        done += one.piece.rows
        now = time.monotonic()
        if now - told >= _SILENT:
            told, rate = now, done / (now - started)
            tell(
                f"task '{rows.task.name}': {begin + done:,} of {len(rows):,} rows encoded, "
                f"{rate:,.0f} rows/s, about {(left - done) / rate:,.0f} s left"
            )


def _known(numbers: np.ndarray) -> np.ndarray:
    """Sorted, each once, without 0."""
    found = np.unique(numbers)
    return found[1:] if len(found) and found[0] == 0 else found
