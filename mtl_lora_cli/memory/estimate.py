"""Whether a recipe is whole, and whether its steps fit this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from mtl_lora_cli.data.bind import bind_tasks
from mtl_lora_cli.data.prepare import prepare_training
from mtl_lora_cli.dense.objective import DenseObjective
from mtl_lora_cli.engine.memory import GIB, needed_bytes, peak_bytes, peak_parts
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.machine.cards import free_memory, pick_device, pick_dtype
from mtl_lora_cli.machine.checks import Check, Verdict, ok
from mtl_lora_cli.memory.choice import Choice, pick
from mtl_lora_cli.memory.maps import memory_of
from mtl_lora_cli.memory.pictures import most_shown, sight_of
from mtl_lora_cli.memory.remedies import Remedy, remedies
from mtl_lora_cli.memory.situation import Situation, UnknownLayersError, densest, longest_of
from mtl_lora_cli.models.base import BaseModel, find_base_model
from mtl_lora_cli.models.host import objective_of
from mtl_lora_cli.models.load import load_config, load_tokenizer, on_meta
from mtl_lora_cli.models.load import (
    longest_of as positions_of_model,
)
from mtl_lora_cli.models.trial import in_a_line, tried

if TYPE_CHECKING:
    from mtl_lora_cli.data.prepare import TrainingData
    from mtl_lora_cli.recipe.load import LoadedRecipe
    from mtl_lora_cli.tasks.task import Task

_PICKED = ("training.gradient_checkpointing", "training.rows_per_pass")


@dataclass(frozen=True)
class Estimate:
    """What one process of a run takes, in bytes.

    Attributes:
        parts: at the fullest moment of a step; see `peak_parts`. `reserve` is what fragmentation and
            the libraries take.
        free: what a process may take.
        device: on which.
        processes: of the run, on this host.
        rows: how many go through the model together, each of so many positions.
        choice: what `training.memory: auto` picks, in one line; None for `manual`.
        settings: what makes it fit, one behind the other, each with what it saves.
        enough: whether all of them together do; True where nothing has to be done.
    """

    parts: dict[str, int]
    free: int
    device: str
    processes: int
    rows: int
    row_length: int
    choice: str | None
    settings: list[tuple[str, int]]
    enough: bool

    @property
    def needed(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.free


def _engine(
    loaded: LoadedRecipe, base: BaseModel, names: Sequence[str], situation: Situation
) -> Check:
    """Which engine runs the base model, by the self-test."""
    config = loaded.recipe.adapter
    try:
        report = tried(loaded.recipe, base, config, names, situation.device, situation.dtype)
    except MtlLoraError as error:
        return Check("engine", Verdict.FAIL, "; ".join(error.lines), "take another base model")
    return Check("engine", Verdict.OK, in_a_line(report))


def examine_recipe(loaded: LoadedRecipe, processes: int) -> tuple[list[Check], Estimate | None]:
    """Check what a recipe names, and estimate the memory of its steps.

    The base model's configuration is enough: no weight is read or fetched. Where its tokenizer or the
    data cannot be read, every position counts as supervised.

    Args:
        loaded: the recipe.
        processes: of the run, on this host.
    """
    recipe = loaded.recipe
    try:
        tasks = bind_tasks(loaded)
        base = find_base_model(recipe.base_model, beside=loaded.base, weights=False)
        names = [task.name for task in tasks]
        kind = objective_of({task.name: task.objective for task in tasks})
        if kind is not None and issubclass(kind, DenseObjective):
            return [_of_maps(loaded, DenseObjective(base, recipe, tasks), processes)], None
        if kind is not None:
            text = f"{len(tasks)} tasks with objective {tasks[0].objective}: their memory is not estimated"
            return [Check("recipe", Verdict.WARN, text, _validate(loaded))], None
        model, adapter = on_meta(base, recipe.adapter, names)
    except MtlLoraError as error:
        return [Check("recipe", Verdict.FAIL, "; ".join(error.lines), _validate(loaded))], None
    device = pick_device()
    situation = Situation(
        recipe=recipe,
        model=model,
        adapter=adapter,
        device=device,
        dtype=pick_dtype(recipe.dtype, device),
        processes=processes,
        densest=lambda length, loss_on: length,
        longest=recipe.training.row_length,
    )
    data, check = _read(loaded, tasks, base)
    checks = [check, _engine(loaded, base, names, situation)]
    if data is not None:
        situation = replace(
            situation,
            densest=lambda length, loss_on: densest(data, length, loss_on),
            longest=longest_of(data),
        )
        sight = sight_of(data, recipe, model, situation.dtype.itemsize)
        if sight is not None:
            shown = partial(most_shown, data)
            situation = replace(situation, sight=sight, shown=shown)
    cards = torch.cuda.device_count()
    if device.type == "cuda" and processes > cards:
        text = f"{processes} processes want a card each, and there are {cards}"
        checks.append(Check("processes", Verdict.FAIL, text, f"--num-processes {cards}"))
    try:
        estimate = _estimate(situation)
    except UnknownLayersError as error:
        text = f"not estimated: {error}"
        return [*checks, Check("fit", Verdict.WARN, text, "mtl-lora train RECIPE --dry-run")], None
    except MtlLoraError as error:
        text = "; ".join(error.lines)
        return [*checks, Check("fit", Verdict.FAIL, text, _validate(loaded))], None
    return [*checks, _verdict(estimate, recipe.distributed.offload)], estimate


def _of_maps(loaded: LoadedRecipe, objective: DenseObjective, processes: int) -> Check:
    """Whether a pass over maps fits, by running it without numbers."""
    training, device = loaded.recipe.training, pick_device()
    mine = -(-training.rows_per_step // processes)
    pictures = mine if training.memory == "auto" else min(training.rows_per_pass, mine)
    found = memory_of(objective, pick_dtype(loaded.recipe.dtype, device), pictures)
    free, name = free_memory(device)
    text = f"about {found.needed / GIB:.1f} GiB with {pictures} pictures a pass; {free / GIB:.1f} GiB are free on {name}"
    if found.needed <= free or training.memory == "auto":
        return Check("fit", Verdict.OK, text)
    return Check("fit", Verdict.FAIL, text, "training.memory=auto, or fewer training.rows_per_pass")


def _validate(loaded: LoadedRecipe) -> str:
    return f"mtl-lora validate {loaded.path}"


def _read(
    loaded: LoadedRecipe, tasks: Sequence[Task], base: BaseModel
) -> tuple[TrainingData | None, Check]:
    """The encoded tasks, if tokenizer and data are there, and what to say of the recipe."""
    weights = list(base.folder.glob("*.safetensors"))
    counted = "every position counts as supervised"
    try:
        tokenizer = load_tokenizer(base)
    except MtlLoraError as error:
        if weights:
            text = f"{'; '.join(error.lines)}; {counted}"
            return None, Check("recipe", Verdict.FAIL, text, _validate(loaded))
        text = f"{base.folder} holds neither weights nor a tokenizer that can be used; {counted}"
        return None, Check("recipe", Verdict.WARN, text)
    try:
        longest = positions_of_model(load_config(base))
        data = prepare_training(tasks, loaded.recipe, tokenizer, longest)
    except MtlLoraError as error:
        text = f"{'; '.join(error.lines)}; {counted}"
        return None, Check("recipe", Verdict.FAIL, text, _validate(loaded))
    count = len(data.tasks)
    text = f"{count} task{'s' * (count > 1)} can be read, base model in {base.folder}"
    if weights:
        return data, ok("recipe", text)
    remedy = f"hf download {base.name}" if base.revision else None
    return data, Check("recipe", Verdict.WARN, f"{text}, without its weights", remedy)


def _estimate(situation: Situation) -> Estimate:
    free, device = free_memory(situation.device)
    if situation.device.type == "cpu":  # all processes share it
        free //= situation.processes
    training, choice = situation.recipe.training, None
    if training.memory == "auto":
        found = pick(situation, free)
        if isinstance(found, Choice):
            choice = found.message(device, training.row_length, training.rows_per_step)
            picked = found.settings()
        else:  # the least that it could pick
            picked = {"memory": "manual", "rows_per_pass": 1, "gradient_checkpointing": True}
        situation = situation.changed(training=training.model_copy(update=picked))
    sizes, recompute, load = situation.step()
    parts = peak_parts(sizes, recompute, load)
    peak = sum(parts.values())
    settings, enough = _settings(situation, free, auto=training.memory == "auto")
    now = situation.recipe.training
    return Estimate(
        parts={**parts, "reserve": needed_bytes(peak) - peak},
        free=free,
        device=device,
        processes=situation.processes,
        rows=load.positions // now.row_length,
        row_length=now.row_length,
        choice=choice,
        settings=settings,
        enough=enough,
    )


def _settings(situation: Situation, free: int, *, auto: bool) -> tuple[list[tuple[str, int]], bool]:
    """The most helpful setting, then the most helpful one beside it, until it fits."""
    chosen: dict[str, Remedy] = {}  # by key: rows may be halved more than once
    while needed_bytes(peak_bytes(*situation.step())) > free:
        found = [one for one in remedies(situation) if not (auto and one.text.startswith(_PICKED))]
        if not found:
            break
        best = found[0]
        key = best.text.partition(":")[0]
        before = chosen[key].saves if key in chosen else 0
        chosen[key] = best._replace(saves=best.saves + before)
        situation = best.situation
    enough = needed_bytes(peak_bytes(*situation.step())) <= free
    return [(one.text, one.saves) for one in chosen.values()], enough


def _verdict(estimate: Estimate, offload: str) -> Check:
    each = "" if estimate.processes == 1 else f" for each of {estimate.processes} processes"
    text = (
        f"a step takes {estimate.needed / GIB:.1f} GiB by estimate, "
        f"{estimate.free / GIB:.1f} are free on {estimate.device}{each}"
    )
    if offload != "none":
        text += f"; offload: {offload} takes less than that"
    if estimate.fits:
        return ok("fit", text)
    found = ", ".join(f"{key} (−{saves / GIB:.1f} GiB)" for key, saves in estimate.settings)
    if not estimate.enough:
        found = f"{found}, and still " if found else ""
        found += "a smaller base_model, or a larger device"
    return Check("fit", Verdict.FAIL, text, f"set {found}")
