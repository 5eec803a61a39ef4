"""A whole training run: from a recipe to a run folder that holds a finished adapter."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from mtl_lora_cli.adapters.config import AdapterConfig
from mtl_lora_cli.adapters.files import save_adapter
from mtl_lora_cli.adapters.inject import Adapter, inject
from mtl_lora_cli.data.encoding import EncodedSplit
from mtl_lora_cli.data.prepare import TrainingData, bind_tasks, prepare_training, with_rows
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.base import BaseModel, find_base_model
from mtl_lora_cli.models.load import load_model, load_tokenizer, pick_device, pick_dtype
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.recipe.load import LoadedRecipe, describe_changes, dump_recipe, load_recipe
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.recipe.schema import Run as RunSettings
from mtl_lora_cli.recipe.schema import Task as RecipeTask
from mtl_lora_cli.runs.atomic import new_folder, write_text
from mtl_lora_cli.runs.folder import RunFolder, create_run, mark_latest, require_new, save_json
from mtl_lora_cli.training.checkpoints import newest_checkpoint
from mtl_lora_cli.training.diagnose import Diagnosis
from mtl_lora_cli.training.environment import describe
from mtl_lora_cli.training.footprint import keep_of
from mtl_lora_cli.training.loop import Trainer
from mtl_lora_cli.training.memory import plan_memory
from mtl_lora_cli.training.observers import Observer
from mtl_lora_cli.training.parts import require_parts
from mtl_lora_cli.training.progress import TrainingProgress
from mtl_lora_cli.training.validation import Validation, encode_validation


def adapter_config(recipe: Recipe) -> AdapterConfig:
    """The recipe's `adapter`, as the adapters' room knows it."""
    fields = recipe.adapter.model_dump()
    fields["target_modules"] = tuple(fields["target_modules"])
    return AdapterConfig(**fields)


@dataclass
class Prepared:
    """A run that is ready to learn.

    Attributes:
        recipe: resolved: absolute paths, no relative source.
        base: the base model's place on this disk.
        tokenizer: of the base model.
        data: encoded tasks.
        total_steps: optimiser steps.
        device, dtype: where and in what the base model computes.
        memory: what `training.memory: auto` picked and why, in one line; None for `manual`.
        validation: held-out examples of each task for `training.validation`; None without it.
    """

    recipe: Recipe
    base: BaseModel
    tokenizer: Any
    data: TrainingData
    total_steps: int
    device: torch.device
    dtype: torch.dtype
    memory: str | None = None
    validation: list[EncodedSplit] | None = None

    @property
    def unvalidated(self) -> list[str]:
        """The tasks that `training.validation` leaves out: they have no validation split."""
        if self.validation is None:
            return []
        pairs = zip(self.data.tasks, self.validation, strict=True)
        return [task.name for task, split in pairs if not len(split)]

    def build(self) -> tuple[PackedModel, Adapter]:
        """The base model with a fresh adapter; the seed decides its start.

        Raises:
            UsageError: the recipe names a layer or a part of the adapter that does not exist.
        """
        set_seed(self.recipe.training.seed)
        model = load_model(
            self.base,
            dtype=self.dtype,
            device=self.device,
            quantization=self.recipe.quantization,
        )
        names = [task.name for task in self.data.tasks]
        adapter = inject(model, adapter_config(self.recipe), names)
        require_parts(adapter, self.recipe.training.parts)
        recompute = self.recipe.training.gradient_checkpointing
        packed = PackedModel(
            model,
            adapter,
            engine=self.recipe.engine,
            keep=keep_of(recompute, model.config.num_hidden_layers),
            base_compute=self.recipe.base_compute,
        )
        if packed.decoder is None and recompute:  # transformers' layers know all or nothing
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return packed, adapter

    def observers(self, packed: PackedModel, adapter: Adapter) -> list[Observer]:
        """Who looks at the run: `training.diagnose` and `training.validation`."""
        settings = self.recipe.training
        found: list[Observer] = []
        if settings.diagnose is not None:
            found.append(Diagnosis(packed, adapter, self.data, settings))
        if self.validation is not None:
            names = [task.name for task in self.data.tasks]
            found.append(
                Validation(packed, adapter, names, self.validation, settings, self.total_steps)
            )
        return found


def prepare(loaded: LoadedRecipe) -> Prepared:
    """Find, read, render and encode everything that a recipe names; write nothing.

    Raises:
        UsageError: anything that the recipe names is missing or wrong.
    """
    from transformers import AutoConfig

    recipe = loaded.recipe
    tasks = bind_tasks(loaded)
    base = find_base_model(recipe.base_model, beside=loaded.base)
    tokenizer = load_tokenizer(base)
    longest = getattr(AutoConfig.from_pretrained(base.folder), "max_position_embeddings", 2**31)
    data = prepare_training(tasks, recipe, tokenizer, longest)
    device = pick_device()
    dtype = pick_dtype(recipe.dtype, device)
    memory = None
    if recipe.training.memory == "auto":
        recipe, memory = plan_memory(recipe, base, adapter_config(recipe), data, device, dtype)
        data = with_rows(data, recipe.training)
    validation = None
    if recipe.training.validation is not None:
        validation = encode_validation(tasks, recipe, tokenizer, longest)
        if not any(map(len, validation)):
            raise loaded.problem(
                ("training", "validation"), "no task's source has a validation split"
            )
    steps = data.mixture.steps_in(recipe.training.epochs)
    if recipe.training.max_steps is not None:
        steps = min(steps, recipe.training.max_steps)
    return Prepared(
        recipe=_resolved(recipe, data, base),
        base=base,
        tokenizer=tokenizer,
        data=data,
        total_steps=steps,
        device=device,
        dtype=dtype,
        memory=memory,
        validation=validation,
    )


def _resolved(recipe: Recipe, data: TrainingData, base: BaseModel) -> Recipe:
    """The recipe with absolute paths, so that the run folder can be read from anywhere."""
    tasks = [
        RecipeTask(
            name=task.name,
            template=task.template_name,
            source=task.source,
            tags=list(task.tags),
            sampling_weight=task.sampling_weight,
            loss_weight=task.loss_weight,
            max_examples=task.max_examples,
            repeat=task.repeat,
        )
        for task in data.tasks
    ]
    path = Path(recipe.base_model).expanduser()
    name = recipe.base_model
    if path.exists():
        name = str(path.resolve())
    elif (
        base.revision is None and base.folder.is_dir() and "/" in name and not name.startswith("/")
    ):
        name = str(base.folder)
    return recipe.model_copy(update={"tasks": tasks, "base_model": name})


def new_run_path(loaded: LoadedRecipe, runs: Path) -> Path:
    """Where a new run goes: `run.directory`, or `runs`; `run.name`, or the recipe's stem and time.

    Raises:
        UsageError: it exists; said before any work is done.
    """
    settings = loaded.recipe.run
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    directory = Path(settings.directory) if settings.directory else runs
    path = directory / (settings.name or f"{loaded.path.stem}-{stamp}")
    require_new(path)
    return path


def start(prepared: Prepared, path: Path, ready: Callable[[], None] = lambda: None) -> RunFolder:
    """Train a new run.

    Args:
        prepared: from its recipe.
        path: of its folder.
        ready: called once nothing can be wrong any more, before anything is written.

    Raises:
        UsageError: the adapter fits nothing in the model, or the run folder exists.
        Interrupted: the user stopped the run; it can be resumed.
    """
    packed, adapter = prepared.build()
    ready()
    run = create_run(path)
    where = RunSettings(name=path.name, directory=str(path.parent.resolve()))
    recipe = prepared.recipe.model_copy(update={"run": where})
    write_text(run.recipe, dump_recipe(recipe))
    save_json(run.tasks, {"tasks": [task.to_json() for task in prepared.data.tasks]})
    save_json(run.environment, describe(prepared.device, prepared.dtype))
    mark_latest(run)
    _learn(run, prepared, packed, adapter, resume=False)
    return run


def resume(run: RunFolder, recipe_path: Path | None, overrides: Sequence[str]) -> RunFolder:
    """Go on with a run from its newest complete checkpoint; from the start where there is none.

    Args:
        run: the run.
        recipe_path: a recipe to compare with the run's own, or None.
        overrides: on the command line, for that recipe.

    Raises:
        UsageError: the run is finished, or the recipe differs from the run's own.
    """
    own = load_recipe(run.recipe)
    if run.adapter.is_dir():
        raise UsageError(f"run '{run.name}' is finished; nothing is left to resume")
    prepared = prepare(own)
    if recipe_path is not None:
        given = prepare(_as_picked(load_recipe(recipe_path, overrides), own.recipe)).recipe
        before = own.recipe.model_dump(mode="json", exclude={"run"})
        changes = describe_changes(before, given.model_dump(mode="json", exclude={"run"}))
        if changes:
            raise UsageError(
                f"the recipe differs from that of run '{run.name}': {'; '.join(changes)}"
            )
    packed, adapter = prepared.build()
    _learn(run, prepared, packed, adapter, resume=True)
    return run


def _as_picked(given: LoadedRecipe, own: Recipe) -> LoadedRecipe:
    """A recipe with `memory: auto`, with what was picked when the run began: free memory differs."""
    wanted, found = given.recipe.training, own.training
    if wanted.memory != "auto":
        return given
    picked = {
        name: getattr(found, name) for name in ("memory", "rows_per_pass", "gradient_checkpointing")
    }
    halves = wanted.row_length // found.row_length
    if halves > 1 and found.rows_per_step == wanted.rows_per_step * halves:
        picked |= {"row_length": found.row_length, "rows_per_step": found.rows_per_step}
    training = wanted.model_copy(update=picked)
    return replace(given, recipe=given.recipe.model_copy(update={"training": training}))


def _learn(
    run: RunFolder, prepared: Prepared, packed: PackedModel, adapter: Adapter, *, resume: bool
) -> None:
    if prepared.device.type == "cpu":  # accelerate imports DeepSpeed, which looks for a card aloud
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    accelerator = Accelerator(cpu=prepared.device.type == "cpu")
    identity = prepared.base.identity()
    trainer = Trainer(
        accelerator,
        packed,
        adapter,
        prepared.data,
        prepared.recipe.training,
        run,
        identity,
        prepared.total_steps,
        prepared.observers(packed, adapter),
    )
    checkpoint = newest_checkpoint(run.checkpoints) if resume else None
    if checkpoint is not None:
        trainer.resume(checkpoint)
        print(f"resuming {run.name} after step {trainer.position.step}", file=sys.stderr)
    if prepared.recipe.base_compute == "fp8" and accelerator.is_main_process:
        print(trainer.rounding(), file=sys.stderr)
    progress = TrainingProgress(prepared.total_steps, trainer.position.step)
    try:
        trainer.train(progress)
    finally:
        progress.close()
    with new_folder(run.adapter) as folder:
        save_adapter(adapter, folder, identity)
        write_text(folder / "README.md", _adapter_readme(prepared, trainer))


def _adapter_readme(prepared: Prepared, trainer: Trainer) -> str:
    recipe = prepared.recipe
    names = ", ".join(task.name for task in prepared.data.tasks)
    return (
        "---\n"
        "library_name: mtl-lora\n"
        "---\n"
        f"# A multi-task adapter for {recipe.base_model}\n\n"
        f"Method: {recipe.adapter.method}, rank {recipe.adapter.rank}, "
        f"{trainer.adapter.config.ups} up-projections, "
        f"{trainer.adapter.parameter_count():,} trained values.\n\n"
        f"Tasks: {names}.\n\n"
        f"Trained for {trainer.position.step} steps on {trainer.position.tokens:,} tokens.\n\n"
        "Read it with `mtl-lora eval` and `mtl-lora merge`; PEFT cannot read this format.\n"
    )
