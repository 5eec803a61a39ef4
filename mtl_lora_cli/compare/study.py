"""A comparison as it is planned: its runs with their recipes, and the rows that score them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mtl_lora_cli.adapters.inject import require_adapted
from mtl_lora_cli.adapters.methods import METHODS, configure
from mtl_lora_cli.adapters.methods.base import Settings
from mtl_lora_cli.compare.grid import (
    CUT,
    TEST,
    VALIDATION,
    Point,
    Variant,
    budget_lines,
    points_of,
    require_known,
    run_name,
    with_settings,
)
from mtl_lora_cli.compare.maps import of_maps, require_possible, trained_values
from mtl_lora_cli.compare.matching import alpha_at, common_target, count_at, match_rank
from mtl_lora_cli.compare.results import PLAN, fixed_in, read_plan
from mtl_lora_cli.compare.rows import cut_source, lacks_validation
from mtl_lora_cli.data.bind import bind_tasks
from mtl_lora_cli.data.sources import split_fingerprint, without_test
from mtl_lora_cli.errors import Problem, ProblemsError, UsageError
from mtl_lora_cli.metrics.declare import direction
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import on_meta
from mtl_lora_cli.recipe.load import LoadedRecipe, describe_changes
from mtl_lora_cli.recipe.schema import Recipe, RunSettings
from mtl_lora_cli.runs.folder import save_json
from mtl_lora_cli.tasks.task import Task, require_text

Shapes = Callable[[Settings], dict[str, tuple[int, ...]]]  # → module path → (out, in)


@dataclass(frozen=True)
class StudyOptions:
    """What a comparison is asked for.

    Attributes:
        methods: in the order of the report.
        match: `params` (as many values as the recipe's own adapter), a number, or None.
        seeds: of the runs.
        sweeps: key → values.
        baseline: the method that the others are compared with.
        limit: at most so many rows of each task score a run.
        variants: name → what it stands for, of the methods that are none of the family's own.
        score: the rows that the report is about, `test` or `validation`.
        references: folders of the runs over which Δm of maps is; none: over the baseline.
    """

    methods: Sequence[str]
    match: int | str | None
    seeds: Sequence[int]
    sweeps: Mapping[str, Sequence[Any]]
    baseline: str
    limit: int | None = None
    variants: Mapping[str, Variant] = field(default_factory=dict)
    score: str = TEST
    references: Sequence[str] = ()

    @property
    def validated(self) -> bool:
        """Whether runs are scored on validation rows: to choose settings, or for the report."""
        return bool(self.sweeps) or self.score == VALIDATION

    def variant(self, name: str) -> Variant:
        """What one of the methods stands for."""
        return self.variants.get(name) or Variant(name)


@dataclass(frozen=True)
class PlannedRun:
    """One run.

    Attributes:
        id: of its folder and its result.
        method, point, seed: which it is.
        parameters: trained values, by formula.
        recipe: with everything filled in.
    """

    id: str
    method: str
    point: Point
    seed: int
    parameters: int
    recipe: Recipe

    def to_json(self) -> dict[str, Any]:
        adapter = self.recipe.adapter
        return {
            "id": self.id,
            "method": self.method,
            "point": self.point.label,
            "settings": dict(self.point.settings),
            "filled": self.point.filled,
            "seed": self.seed,
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "parameters": self.parameters,
        }


@dataclass(frozen=True)
class Study:
    """Everything that is decided before the first run.

    Attributes:
        folder: where everything goes.
        loaded: the recipe with a single task an entry, and sources that hold what may be learned.
        tasks: bound to their own sources, in the order of their ids.
        cut: names of the tasks whose validation rows are cut from train.
        options: what was asked for.
        target: trained values that all methods come near to; None where ranks are the recipe's.
        points: method → its settings.
        runs: seed by seed, so that what is done at any time can be compared.
    """

    folder: Path
    loaded: LoadedRecipe
    tasks: list[Task]
    cut: tuple[str, ...]
    options: StudyOptions
    target: int | None
    points: Mapping[str, Sequence[Point]]
    runs: list[PlannedRun]

    def to_json(self) -> dict[str, Any]:
        """As it stands in plan.json; `fixed` must not change while a comparison goes on."""
        options = self.options
        prints = {
            task.name: {
                split: split_fingerprint(task.source, split, base=Path(), task=task.name)
                for split in self._splits_of(task)
            }
            for task in self.tasks
        }
        return {
            "fixed": {
                "recipe": self.loaded.recipe.model_dump(mode="json"),
                "match": options.match,
                "sweep": {key: list(values) for key, values in options.sweeps.items()},
                "limit": options.limit,
                "score": options.score,
                **({"references": list(options.references)} if options.references else {}),
                "data": prints,
            },
            "methods": list(options.methods),
            "variants": {name: one.text for name, one in options.variants.items()},
            "baseline": options.baseline,
            "seeds": list(options.seeds),
            "target": self.target,
            "budget": budget_lines(self.points, len(options.seeds)),
            "validation": self.validation_said(),
            "runs": [run.to_json() for run in self.runs],
            "recipe_name": self.loaded.path.stem,
            "command_line": ["mtl-lora", *sys.argv[1:]],
        }

    def validation_said(self) -> dict[str, str]:
        """task → its validation rows in words; empty where no run is scored on them."""
        if not self.options.validated:
            return {}
        return {
            task.name: CUT if task.name in self.cut else "validation split" for task in self.tasks
        }

    def _splits_of(self, task: Task) -> tuple[str, ...]:
        """The splits that a comparison reads of a task's own source."""
        if self.options.score == TEST:
            return ("train", VALIDATION, TEST)
        return ("train",) if task.name in self.cut else ("train", VALIDATION)


def plan_study(loaded: LoadedRecipe, folder: Path, options: StudyOptions) -> Study:
    """Bind the tasks, pick the ranks, and list the runs; write nothing.

    Raises:
        UsageError: anything that the recipe or the call names is missing or wrong, or trained
            values cannot be matched.
    """
    recipe = loaded.recipe
    require_known(options.sweeps, recipe)
    if options.match is not None and "adapter.rank" in options.sweeps:
        raise UsageError("--sweep: 'adapter.rank' is what --match picks; use --match none")
    if options.match is not None and recipe.adapter.rank_pattern:
        raise UsageError(
            "--match: adapter.rank_pattern says the ranks of some layers, which --match would pick; "
            "use --match none"
        )
    tasks = bind_tasks(loaded)
    _require_comparable(tasks, options)
    cut = [task.name for task in tasks if options.validated and lacks_validation(task)]
    entries = []
    for task in tasks:
        source = task.source
        if task.name in cut:
            source = cut_source(folder, task)
        elif options.score == VALIDATION:
            source = without_test(source, base=Path(), task=task.name)
        entries.append(task.entry(source))
    settled = recipe.model_copy(update={"tasks": entries, "run": RunSettings()})
    shapes = _shapes(loaded)

    def count_of(chosen: Recipe) -> Callable[[int], int]:
        if of_maps(tasks):
            values = trained_values(loaded, chosen, tasks)
            return lambda rank: values  # of the recipe's rank: others are not asked for
        return count_at(chosen.adapter, shapes(chosen.adapter), len(tasks))

    own = recipe.adapter
    count = len(tasks)
    target = options.match if isinstance(options.match, int) else None
    if options.match == "params":
        target = count_at(own, shapes(own), count)(own.rank)
    rate = recipe.training.learning_rate
    variants = {method: options.variant(method) for method in options.methods}
    points = {name: points_of(one, options.sweeps, rate) for name, one in variants.items()}
    sized = _sizes(settled, points, variants, count_of, target)
    runs = [
        PlannedRun(
            id=run_name(method, point, seed),
            method=method,
            point=point,
            seed=seed,
            parameters=parameters,
            recipe=_seeded(chosen, seed),
        )
        for seed in options.seeds
        for method, point, chosen, parameters in sized
    ]
    return Study(
        folder=folder,
        loaded=replace(loaded, recipe=settled),
        tasks=tasks,
        cut=tuple(cut),
        options=options,
        target=target,
        points=points,
        runs=runs,
    )


Sized = tuple[str, Point, Recipe, int]  # method, its setting, the recipe, trained values


def _sizes(
    recipe: Recipe,
    points: Mapping[str, Sequence[Point]],
    variants: Mapping[str, Variant],
    count_of: Callable[[Recipe], Callable[[int], int]],
    target: int | None,
) -> list[Sized]:
    """The recipe of each setting of each method at its rank, the methods side by side.

    Raises:
        UsageError: methods that cannot be matched, a line each, and a number that would do.
    """
    sized: list[Sized] = []
    counts: list[tuple[Callable[[int], int], int]] = []
    problems: list[Problem] = []
    for number in range(len(next(iter(points.values())))):
        for method, own in points.items():
            point, kind = own[number], variants[method].method
            settings = {**variants[method].settings, **point.settings}
            if target is None:
                chosen = with_settings(recipe, kind, settings)
                count = count_of(chosen)
                sized.append((method, point, chosen, count(chosen.adapter.rank)))
                continue
            step = _rank_step(recipe, kind, settings)
            count = count_of(_at(recipe, kind, settings, step))
            counts.append((count, step))
            name = f"{method} ({point.text})" if point.settings else method
            try:
                rank = match_rank(name, count, target, step)
            except UsageError as error:
                problems.append(Problem("--match", None, "", str(error)))
                continue
            sized.append((method, point, _at(recipe, kind, settings, rank), count(rank)))
    if problems:
        assert target is not None
        common = common_target(counts, target)
        advice = (
            f"params:{common} would do for all"
            if common
            else "no number from half of it to twice as many would do for all; none keeps the "
            "recipe's rank"
        )
        problems.append(Problem("--match", None, "", advice))
        raise ProblemsError(problems)
    return sized


def _at(recipe: Recipe, method: str, settings: Mapping[str, Any], rank: int) -> Recipe:
    """The recipe of a method's setting at a rank, with the scale of its update kept."""
    own = recipe.adapter
    alpha = float(settings.get("adapter.alpha", own.alpha))  # meant for the recipe's own rank
    scaling = settings.get("adapter.scaling", own.scaling)
    sizes = {"adapter.rank": rank, "adapter.alpha": alpha_at(rank, alpha, own.rank, scaling)}
    return with_settings(recipe, method, {**settings, **sizes})


def _require_comparable(tasks: Sequence[Task], options: StudyOptions) -> None:
    """Refuse tasks that no average is of, and options that are not theirs."""
    if of_maps(tasks):
        require_possible(tasks, options)
        return
    if options.references:
        raise UsageError("--references is for maps; texts are compared with --baseline METHOD")
    for task in tasks:
        require_text(task.name, task.objective, "compared with text")
    try:
        direction(task.template.metrics[0] for task in tasks)
    except ValueError as error:
        raise UsageError(f"the tasks cannot be compared as a whole: {error}") from None


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"seed": seed})})


def _rank_step(recipe: Recipe, method: str, settings: Mapping[str, Any]) -> int:
    """Only multiples of it are ranks of the method with these settings."""
    keys = dict(recipe.adapter) if recipe.adapter.method == method else {}
    keys |= {key.removeprefix("adapter."): value for key, value in settings.items()}
    return METHODS[method].rank_step(keys)


def _shapes(loaded: LoadedRecipe) -> Shapes:
    """The adapted layers of the base model, from its configuration alone: no weights are read."""
    base = find_base_model(loaded.recipe.base_model, beside=loaded.base)
    known: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = {}

    def shapes(adapter: Settings) -> dict[str, tuple[int, ...]]:
        targets = (*adapter.target_modules, adapter.experts)
        if targets not in known:
            plain = configure(
                "lora", target_modules=adapter.target_modules, experts=adapter.experts
            )
            layers = on_meta(base, plain, ["task"])[1].layers
            known[targets] = {
                path: (layer.out_features, layer.in_features, layer.units)
                for path, layer in layers.items()
            }
        require_adapted(adapter, known[targets])
        return known[targets]

    return shapes


def checked_plan(study: Study) -> dict[str, Any]:
    """plan.json as it will be; one that is there already must be of the same comparison.

    Methods, seeds and the baseline may be other ones: a comparison may grow.

    Raises:
        UsageError: the folder belongs to another comparison.
    """
    plan = study.to_json()
    plan = json.loads(json.dumps(plan))  # what will be read again: lists, not tuples
    if (study.folder / PLAN).is_file():
        before = fixed_in(read_plan(study.folder))
        with suppress(ValidationError):  # keys that there were not yet have their default
            before["recipe"] = Recipe.model_validate(before["recipe"]).model_dump(mode="json")
        changes = describe_changes(before, plan["fixed"])
        if changes:
            raise UsageError(
                f"{study.folder} holds another comparison: {'; '.join(_short(changes))}; "
                f"choose another --output"
            )
    return plan


def store_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write plan.json.

    Raises:
        UsageError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: {folder} cannot be made: {error.strerror}") from None
    save_json(folder / PLAN, plan)


def _short(changes: Sequence[str], shown: int = 5) -> list[str]:
    cut = [line if len(line) <= 200 else line[:199] + "…" for line in changes[:shown]]
    return cut + ([f"and {len(changes) - shown} more"] if len(changes) > shown else [])
