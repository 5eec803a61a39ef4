"""Everything that a recipe names, found, read and encoded: a run that is ready to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import reduce
from pathlib import Path
from typing import Any

from mtl_lora_cli.data.bind import bind_tasks
from mtl_lora_cli.data.chat_variables import prints_date
from mtl_lora_cli.data.collate import ChosenDataset
from mtl_lora_cli.data.maps import MapDataset
from mtl_lora_cli.data.mixed import mixture_over
from mtl_lora_cli.data.mixture import subset
from mtl_lora_cli.data.one_map import OneMapDataset
from mtl_lora_cli.data.picture_rows import leaks
from mtl_lora_cli.data.prepare import TrainingData, prepare_training, with_fingerprints, with_rows
from mtl_lora_cli.dense.objective import DenseObjective
from mtl_lora_cli.errors import did_you_mean
from mtl_lora_cli.machine.cards import pick_device, pick_dtype
from mtl_lora_cli.machine.processes import ALONE, Processes
from mtl_lora_cli.memory.choice import plan_memory
from mtl_lora_cli.memory.maps import plan_maps
from mtl_lora_cli.metrics.declare import direction
from mtl_lora_cli.models import rehearsal_start
from mtl_lora_cli.models.base import BaseModel, find_base_model
from mtl_lora_cli.models.host import (
    Dataset,
    Objective,
    at_fault,
    examples_of,
    objective_of,
    row_length_of,
)
from mtl_lora_cli.models.load import (
    load_config,
    load_tokenizer,
    longest_of,
)
from mtl_lora_cli.models.vision import vision_class
from mtl_lora_cli.recipe.load import LoadedRecipe
from mtl_lora_cli.recipe.mixing import DynamicMixing
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.recipe.training import Training
from mtl_lora_cli.resources import expanded
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.tasks.maps import MAPS, spec_of
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.training.prepared import Prepared
from mtl_lora_cli.training.reference import with_reference
from mtl_lora_cli.training.trackers import require_trackers
from mtl_lora_cli.training.validation import (
    LOOKED_AT,
    MACRO,
    HeldOut,
    encode_validation,
)


def prepare(
    loaded: LoadedRecipe,
    processes: Processes = ALONE,
    *,
    extends: RunFolder | None = None,
    begins: RunFolder | None = None,
) -> Prepared:
    """Find, read, render and encode everything that a recipe names; write nothing but the cache.

    Args:
        loaded: the recipe.
        processes: this one among those of the run; the first of each host fills the cache.
        extends: the run that the recipe's tasks are added to, if they are.
        begins: the run at whose adapter this one begins, if it does.

    Raises:
        UsageError: anything that the recipe names is missing or wrong.
    """
    require_trackers(loaded.recipe.run.trackers)
    if extends is not None:
        _require_nothing_shared(loaded)
    loaded = with_reference(loaded)
    now = processes.same(datetime.now().isoformat(timespec="seconds"))
    with processes.one_after_another():
        fresh = extends is None and begins is None
        prepared = replace(_prepare(loaded, processes, now, fresh), extends=extends, begins=begins)
    if prepared.recipe.training.memory != "auto":
        return prepared
    if isinstance(prepared.objective, DenseObjective):
        device, dtype = prepared.device, prepared.dtype
        recipe, memory = plan_maps(prepared.objective, prepared.recipe, device, dtype, processes)
        return replace(prepared, recipe=recipe, memory=memory)
    rehearsal_start.wait()  # what compiling takes of a card is not the run's
    situation = prepared.situation()
    assert situation is not None, "memory: auto is for text and maps"
    recipe, memory = plan_memory(situation, processes)
    data = with_rows(prepared.data, recipe.training)
    return replace(
        prepared,
        recipe=recipe,
        data=data,
        memory=memory,
        total_steps=_steps(recipe, data),
        validation=_validation(loaded, recipe, data, prepared.tokenizer, prepared.longest),
    )


def _require_nothing_shared(loaded: LoadedRecipe) -> None:
    """Refuse what looks at shared parameters where only those of new tasks learn."""
    training = loaded.recipe.training
    why = "looks at what tasks share, which does not learn here"
    if training.diagnose is not None:
        raise loaded.problem(("training", "diagnose"), why)
    if training.balance is not None and training.balance.method != "uncertainty":
        raise loaded.problem(("training", "balance"), f"{training.balance.method} {why}")


def _prepare(loaded: LoadedRecipe, processes: Processes, now: str, fresh: bool) -> Prepared:
    deepspeed = _own_deepspeed(loaded)
    tasks = bind_tasks(loaded)
    base = find_base_model(loaded.recipe.base_model, beside=loaded.base)
    kind = objective_of({task.name: task.objective for task in tasks})
    if kind is not None:
        return _prepare_others(loaded, kind, base, tasks, processes, deepspeed)
    shows = any(task.template.images for task in tasks)
    sees = vision_class(load_config(base))
    _require_text_keys(loaded, shows=shows, reads=sees is not None, fresh=fresh)
    if shows and sees is not None and sees.whole_prompt:
        _require_prompts(loaded, tasks)
    _require_streams(loaded, tasks)
    tokenizer = load_tokenizer(base)
    recipe = _dated(loaded.recipe, tokenizer, now)
    longest = longest_of(load_config(base))
    data = prepare_training(tasks, recipe, tokenizer, longest)
    device = pick_device()
    return Prepared(
        recipe=_resolved(recipe, data, base, deepspeed),
        base=base,
        tokenizer=tokenizer,
        data=data,
        total_steps=_steps(recipe, data),
        device=device,
        dtype=pick_dtype(recipe.dtype, device),
        longest=longest,
        validation=_validation(loaded, recipe, data, tokenizer, longest),
        processes=processes,
        deepspeed=deepspeed,
    )


# What only the text host does, and what it is where nobody asks for it.
_OF_TEXT = {
    "engine": "auto",
    "base_compute": "dtype",
    "quantization": "none",
    "prompt_format": "plain",
    "training.memory": "manual",
    "training.loss_on": "answer",
    "training.gradient_checkpointing": False,
    "training.shuffled_tasks": False,
    "training.share_beginnings": False,
    "training.expanded_layers": 0,
}


def _require_streams(loaded: LoadedRecipe, tasks: Sequence[Task]) -> None:
    """Refuse what needs to know all rows of a stream.

    Raises:
        ProblemsError: naming the key.
    """
    streams = [number for number, task in enumerate(tasks) if task.source.stream]
    if not streams:
        return
    training, name = loaded.recipe.training, tasks[streams[0]].name
    asked = {
        ("training", "memory"): training.memory == "auto",
        ("training", "stages"): bool(training.stages),
        ("training", "shuffled_tasks"): training.shuffled_tasks,
        ("training", "share_beginnings"): training.share_beginnings,
        ("mixing",): isinstance(loaded.recipe.mixing, DynamicMixing),
    }
    for key, wrong in asked.items():
        if wrong:
            raise loaded.problem(key, f"does not go with a stream (task '{name}')")
    if training.max_steps is None:
        why = f"a stream has no end (task '{name}'): say after how many steps the run ends"
        raise loaded.problem(("training", "max_steps"), why)
    for number in streams:
        one = tasks[number]
        if one.template.images or one.max_examples is not None:
            what = "pictures" if one.template.images else "max_examples"
            raise loaded.problem(("tasks", number, "source"), f"a stream does not go with {what}")


def _require_text_keys(loaded: LoadedRecipe, *, shows: bool, reads: bool, fresh: bool) -> None:
    """Refuse what only maps of pictures are learned with, or prompts that show some.

    Args:
        loaded: the recipe.
        shows: a task's prompts show pictures.
        reads: the base model reads some.
        fresh: the run begins at no other one, which has its projector.

    Raises:
        ProblemsError: naming the key.
    """
    recipe, images = loaded.recipe, loaded.recipe.images
    of_maps = f"is for maps of pictures ({', '.join(MAPS)}), not for text"
    if recipe.adapter.streams:
        raise loaded.problem(("adapter", "streams"), of_maps)
    neither = not (reads or shows)
    if recipe.adapter.whole_modules and neither:
        why = "is for models that see pictures: maps, or prompts that show some (images, in a template)"
        raise loaded.problem(("adapter", "whole_modules"), why)
    if images is not None and images.augment is not None:
        raise loaded.problem(("images", "augment"), of_maps)
    if images is not None and neither:
        raise loaded.problem(("images",), "is for pictures, and the base model reads none")
    if images is not None and images.projector_start != "base" and fresh and not shows:
        why = "is for prompts that show pictures, and no task's do"
        raise loaded.problem(("images", "projector_start"), why)
    if shows and recipe.training.share_beginnings:
        why = "does not go with pictures in prompts: equal tokens show different pictures"
        raise loaded.problem(("training", "share_beginnings"), why)


def _require_prompts(loaded: LoadedRecipe, tasks: Sequence[Task]) -> None:
    """Refuse what has no place where all of a prompt sees itself and has a picture.

    Raises:
        ProblemsError: naming the key or the task.
    """
    if loaded.recipe.training.loss_on == "all":
        why = "all learns tokens of prompts, which see each other in this base model; use answer"
        raise loaded.problem(("training", "loss_on"), why)
    for number, task in enumerate(tasks):
        if not task.template.images:
            why = f"'{task.name}' shows no pictures; every prompt of this base model has one"
            raise loaded.problem(("tasks", min(number, len(loaded.recipe.tasks) - 1)), why)
        if task.objective == "conversation":
            why = f"'{task.name}' is a conversation; this base model has one prompt and one answer"
            raise loaded.problem(("tasks", min(number, len(loaded.recipe.tasks) - 1)), why)


def _prepare_others(
    loaded: LoadedRecipe,
    kind: type[Objective],
    base: BaseModel,
    tasks: list[Task],
    processes: Processes,
    deepspeed: Path | None,
) -> Prepared:
    """A run whose tasks are no text: what the objective's class reads, in our mixture.

    Raises:
        UsageError: as the class does; or the recipe asks for what only text has.
    """
    recipe, name = loaded.recipe, tasks[0].objective
    for number, task in enumerate(tasks):
        if task.source.stream:
            why = f"stream is for text; tasks with objective {name} go without it"
            raise loaded.problem(("tasks", number, "source"), why)
    for path, plain in _OF_TEXT.items():
        key = tuple(path.split("."))
        if path not in kind.beyond and reduce(getattr, key, recipe) != plain:
            raise loaded.problem(key, f"is for text; tasks with objective {name} go without it")
    if recipe.images is not None and recipe.images.projector_start != "base":
        why = f"is for prompts that show pictures; tasks with objective {name} go without it"
        raise loaded.problem(("images", "projector_start"), why)
    stage = "distributed.zero_stage"
    if recipe.distributed.zero_stage == 3 and stage not in kind.beyond:
        why = f"zero_stage 3 cuts a language model's layers; tasks with objective {name} go up to 2"
        raise loaded.problem(("distributed", "zero_stage"), why)
    bound = [with_fingerprints(task) for task in tasks]
    with at_fault(kind):
        made = kind(base, recipe, bound)
        train = made.dataset("train")
    assert train is not None, "every task has a train split"
    if isinstance(train, MapDataset) and recipe.training.rows == "one_task":
        train = OneMapDataset(train)
    most = [task.max_examples for task in tasks]
    train = _drawn_of(train, tasks, most, recipe.training.seed)
    row_length = row_length_of(train, recipe.training.row_length)
    if name in MAPS:
        _require_maps(loaded, name)
    mixture = mixture_over(recipe, tasks, train.lengths, row_length)
    notes = leaks(bound, [spec_of(one.template) for one in bound]) if name in MAPS else []
    data = TrainingData(bound, [], [], mixture, tuple(notes), others=train)
    validation, held = None, None
    if recipe.training.validation is not None:
        with at_fault(kind):
            held = made.dataset("validation")
        if held is not None:
            most = [recipe.training.validation.examples] * len(tasks)
            held = _drawn_of(held, tasks, most, LOOKED_AT)
        sizes = [0] * len(bound) if held is None else examples_of(held)
        asked = recipe.training.validation.metric and name in MAPS
        validation = [
            HeldOut(task, range(n), metric=task.template.metrics[0] if asked and n else None)
            for task, n in zip(bound, sizes, strict=True)
        ]
        _require_held_out(loaded, validation)
    device = pick_device()
    return Prepared(
        recipe=_resolved(recipe, data, base, deepspeed),
        base=base,
        tokenizer=None,
        data=data,
        total_steps=_steps(recipe, data),
        device=device,
        dtype=pick_dtype(recipe.dtype, device),
        validation=validation,
        processes=processes,
        deepspeed=deepspeed,
        objective=made,
        held=held,
    )


def _require_maps(loaded: LoadedRecipe, name: str) -> None:
    """Refuse what needs rows of each task alone, where tasks learn from the same pictures; and what maps have not.

    Raises:
        ProblemsError: naming the key.
    """
    training = loaded.recipe.training
    asked = {
        ("mixing",): isinstance(loaded.recipe.mixing, DynamicMixing),
        ("training", "stages"): bool(training.stages),
    }
    for key, wrong in asked.items():
        if wrong and training.rows != "one_task":
            why = (
                f"needs rows of one task alone, and tasks with objective {name} learn from the same "
                "pictures; training.rows: one_task shows each picture for one task at a time"
            )
            raise loaded.problem(key, why)
    if training.row_length != Training.model_fields["row_length"].default:
        why = f"is for text; tasks with objective {name} go without it"
        raise loaded.problem(("training", "row_length"), why)


def _drawn_of(
    dataset: Dataset, tasks: Sequence[Task], most: Sequence[int | None], seed: int
) -> Dataset:
    """So many examples of each task at most, drawn as those of a text are."""
    sizes = zip(dataset.lengths, most, tasks, strict=True)
    return ChosenDataset(dataset, [subset(len(n), at, seed, task.name) for n, at, task in sizes])


def _dated(recipe: Recipe, tokenizer: Any, now: str) -> Recipe:
    """The recipe with the run's date, where the chat template prints one: the same ever after."""
    if recipe.prompt_format != "chat" or recipe.chat.date is not None or not prints_date(tokenizer):
        return recipe
    return recipe.model_copy(update={"chat": recipe.chat.model_copy(update={"date": now})})


def _validation(
    loaded: LoadedRecipe, recipe: Recipe, data: TrainingData, tokenizer: Any, longest: int
) -> list[HeldOut] | None:
    settings = recipe.training.validation
    if settings is None:
        return None
    held = encode_validation(data.tasks, recipe, tokenizer, longest)
    _require_held_out(loaded, held)
    return held


def _require_held_out(loaded: LoadedRecipe, held: list[HeldOut]) -> None:
    """Refuse a validation that has nothing to look at, or cannot choose the best checkpoint.

    Raises:
        ProblemsError: no task has held-out examples, or those that `best` names.
    """
    settings = loaded.recipe.training.validation
    assert settings is not None
    if not any(len(one.split) for one in held):
        raise loaded.problem(("training", "validation"), "no task's source has a validation split")
    if settings.best == MACRO:
        try:
            direction(one.metric for one in held if one.metric is not None)
        except ValueError as error:
            why = f"{error}; name a task"
            raise loaded.problem(("training", "validation", "best"), why) from None
    elif settings.best is not None:
        _require_task_held_out(loaded, settings.best, held)


def _require_task_held_out(loaded: LoadedRecipe, name: str, held: list[HeldOut]) -> None:
    """Refuse to choose the best checkpoint by a task that is not looked at.

    Raises:
        ProblemsError: there is no such task, or it has no validation split.
    """
    key = ("training", "validation", "best")
    sizes = {one.task.name: len(one.split) for one in held}
    if name not in sizes:
        known = [MACRO, *sizes]
        raise loaded.problem(
            key, f"unknown task '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}"
        )
    if not sizes[name]:
        raise loaded.problem(key, f"task '{name}': its source has no validation split")


def _steps(recipe: Recipe, data: TrainingData) -> int:
    return data.mixture.steps_in(recipe.training.epochs, recipe.training.max_steps)


def _own_deepspeed(loaded: LoadedRecipe) -> Path | None:
    """The user's DeepSpeed file, beside the recipe or in the working directory.

    Raises:
        UsageError: it does not exist.
    """
    name = loaded.recipe.distributed.deepspeed
    if name is None:
        return None
    path = expanded(name)
    for place in (path, loaded.base / path):
        if place.is_file():
            return place.resolve()
    raise loaded.problem(("distributed", "deepspeed"), f"no such file: '{name}'")


def _resolved(
    recipe: Recipe, data: TrainingData, base: BaseModel, deepspeed: Path | None
) -> Recipe:
    """The recipe with absolute paths, so that the run folder can be read from anywhere."""
    tasks = [task.entry() for task in data.tasks]
    path = expanded(recipe.base_model)
    name = recipe.base_model
    if path.exists():
        name = str(path.resolve())
    elif (
        base.revision is None and base.folder.is_dir() and "/" in name and not name.startswith("/")
    ):
        name = str(base.folder)
    distributed = recipe.distributed.model_copy(
        update={"deepspeed": None if deepspeed is None else str(deepspeed)}
    )
    return recipe.model_copy(
        update={"tasks": tasks, "base_model": name, "distributed": distributed}
    )
