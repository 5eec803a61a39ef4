"""A short search for the learning rate: short runs at several rates, scored on rows that none of them learned.

It is a comparison like others (`compare --score validation`): rows of a task without a validation split are
cut from train, no test file is read, and a search that was stopped goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtl_lora_cli.compare.grid import RATE, UNTRAINED, VALIDATION, Variant
from mtl_lora_cli.compare.results import average, is_done, read_result
from mtl_lora_cli.compare.run import run_study
from mtl_lora_cli.compare.study import Study, StudyOptions, plan_study
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.metrics.declare import direction
from mtl_lora_cli.recipe.load import LoadedRecipe, dump_recipe
from mtl_lora_cli.recipe.training import Parts, Training

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
STEPS = 200  # of a short run
ROWS = 200  # of each task, at most, that score it


@dataclass(frozen=True)
class Tried:
    """One of the rates, all parts of the adapter by the same factor.

    Attributes:
        settings: key → value, what the recipe would say.
        score: mean over the tasks, each by its first metric, on held-out rows; None: the run failed.
        loss: of training, mean over the last tenth of the steps.
        why: it failed.
    """

    settings: Mapping[str, float]
    score: float | None
    loss: float | None
    why: str | None = None


@dataclass(frozen=True)
class RateSearch:
    """What was found.

    Attributes:
        tried: from the lowest rate to the highest.
        best: the one with the best score, of equal ones the lower.
        untrained: score of the base model alone.
        folder: where the runs are.
    """

    tried: Sequence[Tried]
    best: Tried
    untrained: float | None
    folder: Path


def rates_of(training: Training, factor: float) -> dict[str, float]:
    """The recipe's learning rates times a factor, by key: its own one, and those of parts that have one."""
    found = {RATE: training.learning_rate}
    for part in Parts.model_fields:
        own = getattr(training.parts, part).learning_rate
        if own:
            found[f"training.parts.{part}.learning_rate"] = own
    return {key: float(f"{factor * rate:.3g}") for key, rate in found.items()}


def plan_search(loaded: LoadedRecipe, parent: Path, steps: int = STEPS) -> Study:
    """The short runs of a recipe.

    Args:
        loaded: the recipe.
        parent: folder of all comparisons.
        steps: of each run, at most those of the recipe.

    Raises:
        UsageError: as of a comparison: tasks are no text, or have metrics of different directions.
    """
    recipe = loaded.recipe
    most = min(steps, recipe.training.max_steps or steps)
    short = recipe.training.model_copy(update={"max_steps": most, "validation": None})
    loaded = replace(loaded, recipe=recipe.model_copy(update={"training": short}))
    mark = hashlib.sha256(dump_recipe(loaded.recipe).encode()).hexdigest()[:8]
    method = recipe.adapter.method
    names = {f"x{factor:g}": rates_of(recipe.training, factor) for factor in FACTORS}
    options = StudyOptions(
        methods=list(names),
        match=None,
        seeds=[recipe.training.seed],
        sweeps={},
        baseline="x1",
        limit=ROWS,
        variants={name: Variant(method, settings) for name, settings in names.items()},
        score=VALIDATION,
    )
    return plan_study(loaded, parent / f"{loaded.path.stem}-rates-{mark}", options)


def find_rate(study: Study, say: Callable[[str], None]) -> RateSearch:
    """Do the short runs that are not done, and choose.

    Raises:
        MtlLoraError: every one of them failed.
    """
    run_study(study, say)
    tried = [
        _tried(study.options.variant(run.method).settings, read_result(study.folder, run.id))
        for run in study.runs
    ]
    higher = direction(task.template.metrics[0] for task in study.tasks) == "higher"
    scored = [one for one in tried if one.score is not None]
    if not scored:
        raise MtlLoraError(
            f"no rate could be tried: {tried[0].why}; the runs are in {study.folder}"
        )
    best = max(scored, key=lambda one: (one.score or 0.0) * (1 if higher else -1))
    alone = read_result(study.folder, UNTRAINED)
    untrained = average(alone[VALIDATION]) if is_done(alone) and alone is not None else None
    return RateSearch(tried, best, untrained, study.folder)


def _tried(settings: Mapping[str, Any], result: Mapping[str, Any] | None) -> Tried:
    if result is None or not is_done(result):
        return Tried(settings, None, None, "no result" if result is None else result["reason"])
    return Tried(settings, average(result[VALIDATION]), result["last_loss"])
