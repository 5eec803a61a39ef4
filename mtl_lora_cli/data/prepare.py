"""From a recipe's tasks to rendered and encoded examples."""

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

import numpy as np

from mtl_lora_cli.data import cache
from mtl_lora_cli.data.across import across
from mtl_lora_cli.data.audit import Audit, require_no_blank
from mtl_lora_cli.data.beginnings import Beginnings
from mtl_lora_cli.data.dynamic import DynamicMixture
from mtl_lora_cli.data.encode_task import MANY_ROWS, encode_task, encode_window
from mtl_lora_cli.data.encoded import EncodedSplit
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.data.mixture import Mixture, all_positions, subset
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
    resolve,
    split_fingerprint,
    tasks_in,
    untrained_in,
)
from mtl_lora_cli.data.stages import Part, StagedMixture
from mtl_lora_cli.data.task_rows import TaskRows, held_out_rows, task_rows
from mtl_lora_cli.data.windows import Windows, streaming
from mtl_lora_cli.errors import MtlLoraError, ProblemsError, UsageError, did_you_mean
from mtl_lora_cli.machine.pool import in_pieces
from mtl_lora_cli.recipe.load import LoadedRecipe
from mtl_lora_cli.recipe.mixing import DynamicMixing, TemperatureMixing
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.recipe.source import SPLITS
from mtl_lora_cli.recipe.training import Training
from mtl_lora_cli.tasks.chosen import EVERY
from mtl_lora_cli.tasks.maps import MAPS
from mtl_lora_cli.tasks.registry import find_template
from mtl_lora_cli.tasks.task import Task, measured_by, overlaid

if TYPE_CHECKING:
    from mtl_lora_cli.models.host import Dataset

_LONG = (
    0.3  # seconds that a task's encoding takes: then processes for the others are worth their start
)
_MOST_DRAWN = 2**28  # examples an epoch: each takes 8 bytes, and 25 while rows are packed


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


def bind_tasks(loaded: LoadedRecipe) -> list[Task]:
    """Find each task's template and source; a source with a task column becomes several tasks.

    Raises:
        ProblemsError: an unknown template, a fault in one, a task without a source, or a name that
            stands twice or for all tasks.
    """
    tasks: list[Task] = []
    for index, entry in enumerate(loaded.recipe.tasks):
        try:
            name, path, template = find_template(entry.template, loaded.base)
        except ProblemsError:
            raise
        except UsageError as error:
            raise loaded.problem(("tasks", index, "template"), str(error)) from None
        if entry.objective not in (None, template.objective):
            raise loaded.problem(
                ("tasks", index, "objective"),
                f"the template '{name}' is for {template.objective}, received {entry.objective}",
            )
        try:
            template = measured_by(template, entry.metrics)
        except ValueError as error:
            raise loaded.problem(("tasks", index, "metrics"), str(error)) from None
        try:
            template = overlaid(template, entry.conversation)
        except ValueError as error:
            raise loaded.problem(("tasks", index, "conversation"), str(error)) from None
        given = entry.source or template.source
        if given is None:
            raise loaded.problem(
                ("tasks", index, "name"),
                f"the template '{name}' has no source of its own; give the task '{entry.name}' one",
            )
        key = ("tasks", index, "source")
        source = resolve(given, base=loaded.base_of(key) if entry.source else path.parent)
        fans_out = source.task_column is not None and source.task is None
        names = tasks_in(source, base=Path(), task=entry.name) if fans_out else (entry.name,)
        for one in names:
            if one == EVERY:
                raise loaded.problem(
                    ("tasks", index, "name"),
                    f"a task cannot be called '{EVERY}': --task {EVERY} stands for every task of a run",
                )
            if any(task.name == one for task in tasks):
                raise loaded.problem(("tasks", index), f"the task '{one}' stands twice")
            tasks.append(
                Task(
                    name=one,
                    id=len(tasks),
                    # A path is kept whole: the run folder lies elsewhere than the recipe.
                    template_name=str(path.resolve()) if name.endswith((".yaml", ".yml")) else name,
                    template_text=path.read_text(encoding="utf-8"),
                    template=template,
                    source=source.model_copy(update={"task": one}) if fans_out else source,
                    objective=template.objective,
                    conversation=entry.conversation,
                    metrics=None if entry.metrics is None else tuple(entry.metrics),
                    tags=tuple(dict.fromkeys([*template.tags, *entry.tags])),
                    loss_weight=entry.loss_weight,
                    sampling_weight=entry.sampling_weight,
                    max_examples=entry.max_examples,
                    repeat=entry.repeat,
                )
            )
    return tasks


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
            require_no_blank(task.name, found.blank)
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


def mixture_of(recipe: Recipe, tasks: Sequence[Task], lengths: Sequence[np.ndarray]) -> Mixture:
    """The stream of rows that a recipe says.

    Args:
        recipe: its `mixing` and `training`.
        tasks: in the order of their ids.
        lengths: of each task the tokens of each of its examples.

    Raises:
        UsageError: an epoch would draw nothing, or more than a run can hold.
    """
    return mixture_over(recipe, tasks, [all_positions(tokens) for tokens in lengths])


def mixture_over(
    recipe: Recipe,
    tasks: Sequence[Task],
    lengths: Sequence[np.ndarray],
    row_length: int | None = None,
) -> Mixture:
    """The same of examples of which it is known how much of a row each takes.

    Args:
        recipe, tasks: as of `mixture_of`.
        lengths: of each task how much of a row each of its examples takes.
        row_length: what a row holds; None: what the recipe says.

    Raises:
        UsageError: likewise; or an example is longer than a row.
    """
    row_length = row_length or recipe.training.row_length
    for task, own in zip(tasks, lengths, strict=True):
        if len(own) and not 1 <= own.min() <= own.max() <= row_length:
            raise UsageError(
                f"task '{task.name}': its examples take {own.min()} to {own.max()} of a row; expected 1 to "
                f"training.row_length ({recipe.training.row_length})"
            )
    mixture = _mixture(recipe, tasks, lengths, row_length)
    drawn = mixture.examples_an_epoch
    if drawn == 0:
        raise UsageError(
            "tasks: an epoch would draw no example: 'repeat' times the examples of each task rounds to 0"
        )
    if drawn > _MOST_DRAWN:
        raise UsageError(
            f"tasks: an epoch would draw {drawn:,} examples, more than {_MOST_DRAWN:,}; lower 'repeat', "
            "and say training.epochs for more passes"
        )
    return mixture


def _mixture(
    recipe: Recipe, tasks: Sequence[Task], lengths: Sequence[np.ndarray], row_length: int
) -> Mixture:
    """Of the kind that the recipe says."""
    mixing, training = recipe.mixing, recipe.training
    strategy, temperature = (
        ("temperature", mixing.temperature)
        if isinstance(mixing, TemperatureMixing)
        else (mixing.start if isinstance(mixing, DynamicMixing) else mixing, 1.0)
    )
    settings: dict[str, Any] = {
        "names": tuple(task.name for task in tasks),
        "lengths": tuple(lengths),
        "row_length": row_length,
        "rows_per_step": training.rows_per_step,
        "strategy": strategy,
        "weights": tuple(task.sampling_weight for task in tasks),
        "temperature": temperature,
        "repeats": tuple(task.repeat for task in tasks),
        "seed": training.seed,
        "one_task": training.rows == "one_task",
    }
    if isinstance(mixing, DynamicMixing):
        return DynamicMixture(**settings, every=mixing.every)
    if training.stages:
        return StagedMixture(**settings, parts=_parts(training, tasks))
    return Mixture(**settings)


def _parts(training: Training, tasks: Sequence[Task]) -> tuple[Part, ...]:
    """The recipe's stages by the tasks' ids.

    Raises:
        UsageError: a stage names no task of the recipe, or no stage names a task.
    """
    ids = {task.name: number for number, task in enumerate(tasks)}
    for number, stage in enumerate(training.stages):
        for name in stage.tasks:
            if name not in ids:
                raise UsageError(
                    f"training.stages[{number}].tasks: unknown task '{name}'{did_you_mean(name, ids)}; "
                    f"tasks: {', '.join(ids)}"
                )
    named = {name for stage in training.stages for name in stage.tasks}
    for name in ids:
        if name not in named:
            raise UsageError(
                f"training.stages: task '{name}' is in no stage; it would not be learned"
            )
    return tuple(
        Part(tuple(sorted(ids[name] for name in stage.tasks)), stage.epochs)
        for stage in training.stages
    )


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
