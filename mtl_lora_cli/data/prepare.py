"""Rows of tasks, rendered and encoded, from the cache where they have been there before."""

from __future__ import annotations

import gc
import io
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl_lora_cli.data import cache
from mtl_lora_cli.data.across import across
from mtl_lora_cli.data.audit import Audit, require_no_blank
from mtl_lora_cli.data.beginnings import Beginnings
from mtl_lora_cli.data.encode_task import MANY_ROWS, encode_task, encode_window
from mtl_lora_cli.data.encoded import EncodedSplit
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.data.mixed import mixture_over
from mtl_lora_cli.data.mixture import Mixture, subset
from mtl_lora_cli.data.picture_rows import map_print
from mtl_lora_cli.data.pictured import (
    Eyes,
    joined_print,
    picture_root,
    split_print,
)
from mtl_lora_cli.data.sources import (
    Rows,
    read_split,
    split_fingerprint,
    untrained_in,
)
from mtl_lora_cli.data.task_rows import TaskRows, held_out_rows, task_rows
from mtl_lora_cli.data.windows import Windows, streaming
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.machine.pool import in_pieces
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.recipe.source import SPLITS
from mtl_lora_cli.recipe.training import Training
from mtl_lora_cli.tasks.maps import MAPS
from mtl_lora_cli.tasks.task import Task

if TYPE_CHECKING:
    from mtl_lora_cli.models.host import Dataset


_LONG = (
    0.3  # seconds that a task's encoding takes: then processes for the others are worth their start
)


@dataclass(frozen=True)
class TrainingData:
    """Everything a run learns from.

    Attributes:
        tasks: in the order of their ids, with fingerprints.
        splits: encoded training examples of each task.
        audits: what was noticed about each task's rows.
        mixture: the stream of rows.
        notes: what is good to know of all tasks, a line each.
        others: the examples where they are no text; then there are no splits and no audits.
        eyes: what the model sees of rows' pictures; None: they show none.
        windows: the examples of later windows, where tasks are streams; `splits` are those of the first.
    """

    tasks: list[Task]
    splits: list[EncodedSplit]
    audits: list[Audit]
    mixture: Mixture
    notes: tuple[str, ...] = ()
    others: Dataset | None = None
    eyes: Eyes | None = None
    windows: Windows | None = None

    def dataset(self, loss_on: str) -> Dataset:
        """The examples as rows are made of them; `loss_on` says what of a text is learned."""
        from mtl_lora_cli.data.collate import TextDataset  # loads torch

        if self.others is not None:
            return self.others
        return TextDataset(self.splits, loss_on, self.eyes, share=self.shares, windows=self.windows)

    @property
    def shares(self) -> bool:
        """Whether examples of a row share what they begin with."""
        return bool(self.mixture.beginnings)

    @property
    def entries(self) -> list[int]:
        """Under which task's id the mixture has each task's examples: its own, or, where tasks learn from the
        same pictures, the first one's."""
        return list(getattr(self.others, "entries", range(len(self.tasks))))

    def planned(self) -> list[int]:
        """Examples of each task in one epoch."""
        drawn = self.mixture.planned_counts()
        own: list[int] | None = getattr(self.others, "examples", None)
        if own is None:
            return drawn
        return [
            round(drawn[entry] * count / len(self.mixture.lengths[entry]))
            for entry, count in zip(self.entries, own, strict=True)
        ]


def read_rows(
    task: Task, split: str, *, at_most: int | None = None, seed: int = 0
) -> tuple[list[Any], list[str], Rows] | None:
    """Read one split of a task, as it is.

    Args:
        task, split, at_most, seed: as `read_examples`.

    Returns:
        Rows that are kept, file and line of each, and the whole split; None where there is no such split.

    Raises:
        UsageError: a file cannot be read.
    """
    found = read_split(task.source, split, base=Path(), task=task.name)
    if found is None:
        return None
    numbers = subset(len(found.rows), at_most, seed, task.name).tolist()
    return [found.rows[number] for number in numbers], [found.where(n) for n in numbers], found


def read_examples(
    task: Task,
    split: str,
    *,
    at_most: int | None = None,
    seed: int = 0,
    labelled: bool = True,
) -> Examples | None:
    """Read and render one split of a task.

    Args:
        task, split, at_most, seed, labelled: as of `task_rows`.

    Returns:
        The examples, or None where the source has no such split.

    Raises:
        UsageError: a file, a row, or a label is wrong.
    """
    return _rendered(task_rows(task, split, at_most=at_most, seed=seed, labelled=labelled))


def _rendered(rows: TaskRows | None) -> Examples | None:
    """All of them at once."""
    return None if rows is None else _printed(rows.task, rows.piece())


def _printed(task: Task, found: Examples) -> Examples:
    """With a fingerprint that holds for the pictures, too."""
    if not task.template.images:
        return found
    shown = (one.images for one in found.examples)
    return replace(found, fingerprint=joined_print(found.fingerprint, shown))


def untrained(tasks: Sequence[Task]) -> dict[str, str]:
    """Tasks that stand only in the held-out rows of these tasks' files, and what that means.

    Raises:
        UsageError: a row's task is not known.
    """
    return {
        name: f"{count:,} {split} rows are of it, and no training row: it is neither learned nor evaluated"
        for task in tasks
        for name, (split, count) in untrained_in(task.source, base=Path(), task=task.name).items()
    }


def held_out_examples(task: Task, split: str | None = None) -> Examples | None:
    """The rows that a task is evaluated on: test, or validation where there is no test split.

    Many of them are rendered whenever they are asked for.
    """
    rows = held_out_rows(task, split)
    return None if rows is None else _printed(task, rows.examples())


def prepare_training(
    tasks: Sequence[Task], recipe: Recipe, tokenizer: Any, longest: int
) -> TrainingData:
    """Read, render, encode and audit every task's training split, or take it from the cache.

    Args:
        tasks: bound tasks.
        recipe: the run's recipe.
        tokenizer: the base model's.
        longest: positions that the base model knows.

    Raises:
        UsageError: data that cannot be learned from, naming file and line.
    """
    training = recipe.training
    encoder = Encoder.of(tokenizer, recipe)
    limit = min(training.row_length, longest)
    bound, splits, audits, seen = [], [], [], []
    for number, task in enumerate(tasks):
        began = time.monotonic()
        with _no_collection():
            known, encoded, found, rows = _prepare_task(task, recipe, encoder, limit)
        if number == 0 and (time.monotonic() - began) * (len(tasks) - 1) > _LONG:
            _keep_beside(tasks[1:], recipe, encoder, limit)
        if recipe.blank_fields == "error":
            require_no_blank(task.name, found.odd)
        bound.append(known)
        splits.append(encoded)
        audits.append(found)
        seen.append(rows)
    audits = across([task.name for task in bound], audits, seen)
    if encoder.beyond is not None:
        encoder.beyond.require_known(encoder.answer_end)  # it ends every answer
    mixture = mixture_over(recipe, tasks, [split.positions for split in splits])
    if training.share_beginnings:
        mixture = replace(mixture, beginnings=tuple(map(_beginnings_of, splits)))
    windows = _windows(tasks, bound, splits, recipe, encoder, limit)
    if windows is not None:
        mixture = streaming(mixture, windows)
    eyes = encoder.eyes if any(task.template.images for task in tasks) else None
    notes = tuple(encoder.notes)
    return TrainingData(bound, splits, audits, mixture, notes, eyes=eyes, windows=windows)


def _beginnings_of(split: EncodedSplit) -> Beginnings:
    taken = split.positions.tolist()
    return Beginnings([split.example(number)[:count] for number, count in enumerate(taken)])


def with_rows(data: TrainingData, training: Training) -> TrainingData:
    """The same examples in rows of another length, or in another number of them a step."""
    mixture = replace(
        data.mixture, row_length=training.row_length, rows_per_step=training.rows_per_step
    )
    return replace(data, mixture=mixture)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Millions of lists are made and none of them in cycles: looking for cycles costs a tenth."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def with_fingerprints(task: Task) -> Task:
    """The task with the hash of each of its splits.

    Raises:
        UsageError: there is nothing to learn from.
    """
    of = map_print if task.objective in MAPS else _row_print
    prints = {split: of(task, split) for split in SPLITS}
    if prints["train"] is None:
        raise UsageError(f"task '{task.name}': its source has no train split")
    found = {split: value for split, value in prints.items() if value is not None}
    return replace(task, fingerprints=found)


def rows_changed(task: Task, split: str) -> bool:
    """Whether a split's rows are others than when the run began; False where that was not recorded.

    Args:
        task: of a run, with its own source.
        split: one that it has now.
    """
    of = map_print if task.objective in MAPS else _row_print
    return bool(task.fingerprints) and of(task, split) != task.fingerprints.get(split)


def _row_print(task: Task, split: str) -> str | None:
    found = split_fingerprint(task.source, split, base=Path(), task=task.name)
    if found is None or not task.template.images:
        return found
    return split_print(task, split, found)


def _seen_where(task: Task, encoder: Encoder) -> list[str]:
    """What of pictures decides an encoding: how they are seen, and where they lie, which is kept with it."""
    return [encoder.eyes.settings, str(picture_root(task).absolute())]


def _windows(
    tasks: Sequence[Task],
    bound: Sequence[Task],
    splits: Sequence[EncodedSplit],
    recipe: Recipe,
    encoder: Encoder,
    limit: int,
) -> Windows | None:
    """What comes behind the first window of streams; None without them."""
    streams = [number for number, task in enumerate(tasks) if task.source.stream]
    if not streams:
        return None
    keys = [
        _key(task, one.fingerprints, recipe, encoder, limit)
        for task, one in zip(tasks, bound, strict=True)
    ]

    def encode(number: int, window: int) -> EncodedSplit:
        task = tasks[number]
        key = cache.key_of(first=keys[number], window=window)
        make = partial(encode_window, task, recipe, encoder, limit, window)
        with _no_collection():
            return _stored(key, task, make)[0]

    return Windows(splits, streams, encode, repr(keys))


def _prepare_task(
    task: Task, recipe: Recipe, encoder: Encoder, limit: int
) -> tuple[Task, EncodedSplit, Audit, cache.Traces]:
    bound = with_fingerprints(task)
    key = _key(task, bound.fingerprints, recipe, encoder, limit)
    return bound, *_stored(key, task, partial(encode_task, task, recipe, encoder, limit))


def _keep_beside(tasks: Sequence[Task], recipe: Recipe, encoder: Encoder, limit: int) -> None:
    """Encode tasks in processes beside each other, for the cache. What fails there is done again, and told, here."""
    small = [task for task in tasks if not (task.template.images or task.source.stream)]
    if len(small) < 2:
        return

    def keep(first: int, last: int) -> None:
        with redirect_stderr(io.StringIO()), suppress(Exception):
            (task,) = small[first:last]
            at_most, seed = task.max_examples, recipe.training.seed
            rows = task_rows(task, "train", at_most=at_most, seed=seed)
            if rows is not None and len(rows) < MANY_ROWS:  # more have processes of their own
                _prepare_task(task, recipe, encoder, limit)

    with suppress(MtlLoraError):
        deque(in_pieces(keep, len(small), 1), maxlen=0)


def _key(task: Task, found: Mapping[str, str], recipe: Recipe, encoder: Encoder, limit: int) -> str:
    """What the task's examples are kept under."""
    training = recipe.training
    return cache.key_of(
        template=task.wording,
        fingerprints=found,
        encoder=encoder.fingerprint,
        beyond=sorted(encoder.beyond.tokens) if encoder.beyond is not None else [],
        limit=limit,
        on_overflow=training.on_overflow,
        subset=[task.max_examples, training.seed, task.name] if task.max_examples else None,
        **({"pictures": _seen_where(task, encoder)} if task.template.images else {}),
        **({"buffer": task.source.window} if task.source.stream else {}),
    )


def _stored(key: str, task: Task, make: Callable[[], cache.Stored]) -> cache.Stored:
    """From the cache; else made, by one process at a time, and kept."""
    stored = cache.load(key)
    if stored is None:
        with cache.claimed(key, task.name):
            stored = cache.load(key)
            if stored is None:
                stored = make()
                cache.store(key, *stored)
                stored = cache.load(key) or stored  # mapped, and shared
    return stored
