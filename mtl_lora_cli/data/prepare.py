"""From a recipe's tasks to rendered and encoded examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtl_lora_cli.data.encoding import EncodedSplit, Encoder, encode_split
from mtl_lora_cli.data.mixture import Mixture, subset
from mtl_lora_cli.data.sources import read_split, resolve
from mtl_lora_cli.errors import ProblemsError, UsageError
from mtl_lora_cli.recipe.load import LoadedRecipe
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.tasks.registry import find_template
from mtl_lora_cli.tasks.rendering import Example, Renderer
from mtl_lora_cli.tasks.task import Task


@dataclass(frozen=True)
class Examples:
    """Rendered rows of one split.

    Attributes:
        split: the split's name.
        examples: rendered.
        wheres: file and line of each.
        rows: the rows themselves.
        fingerprint: hash of the rows.
    """

    split: str
    examples: list[Example]
    wheres: list[str]
    rows: Sequence[Any]
    fingerprint: str


@dataclass(frozen=True)
class TrainingData:
    """Everything a run learns from.

    Attributes:
        tasks: in the order of their ids, with fingerprints.
        splits: encoded training examples of each task.
        mixture: the stream of rows.
    """

    tasks: list[Task]
    splits: list[EncodedSplit]
    mixture: Mixture


def bind_tasks(loaded: LoadedRecipe) -> list[Task]:
    """Find each task's template and source.

    Raises:
        ProblemsError: an unknown template, a fault in one, or a task without a source.
    """
    tasks = []
    for index, entry in enumerate(loaded.recipe.tasks):
        try:
            name, path, template = find_template(entry.template, loaded.base)
        except ProblemsError:
            raise
        except UsageError as error:
            raise loaded.problem(("tasks", index, "template"), str(error)) from None
        source = entry.source or template.source
        if source is None:
            raise loaded.problem(
                ("tasks", index, "name"),
                f"the template '{name}' has no source of its own; give the task '{entry.name}' one",
            )
        tasks.append(
            Task(
                name=entry.name,
                id=index,
                # A path is kept whole: the run folder lies elsewhere than the recipe.
                template_name=str(path.resolve()) if name.endswith((".yaml", ".yml")) else name,
                template_text=path.read_text(encoding="utf-8"),
                template=template,
                source=resolve(source, base=loaded.base if entry.source else path.parent),
                objective=entry.objective,
                tags=(*template.tags, *entry.tags),
                loss_weight=entry.loss_weight,
                sampling_weight=entry.sampling_weight,
                max_examples=entry.max_examples,
            )
        )
    return tasks


def read_examples(
    task: Task, split: str, *, at_most: int | None = None, seed: int = 0
) -> Examples | None:
    """Read and render one split of a task.

    Args:
        task: bound to its source.
        split: `train`, `validation` or `test`.
        at_most: keep so many rows, drawn by `seed` and the task's name.
        seed: of that draw.

    Returns:
        The examples, or None where the source has no such split.

    Raises:
        UsageError: a file, a row, or a label is wrong.
    """
    found = read_split(task.source, split, base=Path(), task=task.name)
    if found is None:
        return None
    renderer = Renderer(task.template, task.name)
    numbers = subset(len(found.rows), at_most, seed, task.name).tolist()
    wheres = [found.where(number) for number in numbers]
    rows = [found.rows[number] for number in numbers]
    examples = [renderer.render(row, where) for row, where in zip(rows, wheres, strict=True)]
    return Examples(split, examples, wheres, rows, found.fingerprint)


def prepare_training(
    tasks: Sequence[Task], recipe: Recipe, tokenizer: Any, longest: int
) -> TrainingData:
    """Read, render and encode every task's training split.

    Args:
        tasks: bound tasks.
        recipe: the run's recipe.
        tokenizer: the base model's.
        longest: positions that the base model knows.

    Raises:
        UsageError: data that cannot be learned from, naming file and line.
    """
    training = recipe.training
    encoder = Encoder(tokenizer, recipe.prompt_format)
    splits, bound = [], []
    for task in tasks:
        examples = read_examples(task, "train", at_most=task.max_examples, seed=training.seed)
        if examples is None:
            raise UsageError(f"task '{task.name}': its source has no train split")
        splits.append(
            encode_split(
                examples.examples,
                examples.wheres,
                encoder,
                task=task.name,
                limit=min(training.row_length, longest),
                on_overflow=training.on_overflow,
            )
        )
        bound.append(replace(task, fingerprints={"train": examples.fingerprint}))
    strategy = recipe.mixing if isinstance(recipe.mixing, str) else "temperature"
    mixture = Mixture(
        names=tuple(task.name for task in tasks),
        lengths=tuple(split.lengths for split in splits),
        row_length=training.row_length,
        rows_per_step=training.rows_per_step,
        strategy=strategy,
        weights=tuple(task.sampling_weight for task in tasks),
        temperature=1.0 if isinstance(recipe.mixing, str) else recipe.mixing.temperature,
        seed=training.seed,
    )
    return TrainingData(bound, splits, mixture)
