"""All that a report says, gathered from run folders: JSON that the page is made of, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from statistics import median
from typing import Any

from mtl_lora_cli.adapters.files import read_alone
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.metrics.guessing import guessed, one_sided
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.report.adapter import inspect_adapter
from mtl_lora_cli.report.curves import (
    drawn_examples,
    metric_names,
    training_curves,
    validation_looks,
)
from mtl_lora_cli.report.events import Events, mean_cosine, number, read_events, training_facts
from mtl_lora_cli.report.rows import answered
from mtl_lora_cli.report.scores import read_scores
from mtl_lora_cli.report.settings import settings
from mtl_lora_cli.runs.folder import RunFolder, read_json
from mtl_lora_cli.runs.listing import summary
from mtl_lora_cli.tasks.chosen import read_tasks
from mtl_lora_cli.training.checkpoints import newest_checkpoint
from mtl_lora_cli.training.signs import signs, undrawn
from mtl_lora_cli.training.spikes import spikes, told

FORMAT_VERSION = 1
_NUMBERS = 40_000  # of one part of an adapter; more than that are not shown, but counted
_OF_TRAINING = ("tokens", "seconds", "tokens_per_second", "peak_memory_gib", "last_loss")
_OF_ENVIRONMENT = ("threads", "python", "platform", "versions", "git_revision", "command_line")


def gather(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """The facts of some runs, as `mtl-lora report --json` prints them; docs/report.md names the keys.

    No model is loaded, and no file is written.

    Raises:
        UsageError: a recipe is damaged.
        MtlLoraError: tasks.json is missing or damaged.
    """
    names = [run.path.resolve().name for run in runs]
    labels = [
        name if names.count(name) == 1 else str(run.path)
        for name, run in zip(names, runs, strict=True)
    ]
    recipes = [load_recipe(run.recipe).recipe for run in runs]
    return {
        "format_version": FORMAT_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": metadata.version("mtl-lora"),
        "runs": [
            {"label": label, **_facts(run, recipe)}
            for run, recipe, label in zip(runs, recipes, labels, strict=True)
        ],
        "recipe": settings(recipes),
    }


def _facts(run: RunFolder, recipe: Recipe) -> dict[str, Any]:
    tasks = read_tasks(run)
    names = [task.name for task in tasks]
    events = read_events(run)
    found = read_scores(run, names)
    adapter, source = _adapter(run)
    plan = read_json(run.tasks).get("mixture") or {}
    environment = read_json(run.environment) if run.environment.is_file() else {}
    notes = [found.damaged] if found.damaged else []
    if events.unreadable:
        notes.append(f"{events.unreadable} lines of metrics.jsonl cannot be used and are left out")
    if not events.steps:
        notes.append("no step is logged")
    if not found.results and not found.damaged:
        notes.append(f"no results yet; get them with: mtl-lora eval --run {run.path} --task all")
    notes += source
    notes += signs([*events.steps, *events.validations, *events.unreached])
    notes += (
        undrawn(events.steps, list(plan.get("examples", names))) if run.adapter.is_dir() else []
    )
    clipped = recipe.training.clipping is not None
    notes += told(spikes(events.steps), len(events.steps), clipped=clipped)
    notes += [
        f"{one['task']}: {one_sided(one['one_answer'])}"
        for one in found.results
        if one.get("one_answer")
    ]
    notes += [
        f"{one['task']}: {guessed(one['guess'])}"
        for one in found.results
        if one.get("guess") and not one.get("one_answer") and one["model"] != "base"
    ]
    learned = list(plan.get("examples", names))
    return {
        "path": str(run.path.resolve()),
        "summary": _summary(run, recipe, events, adapter, plan, environment, len(tasks)),
        "environment": {key: environment.get(key) for key in _OF_ENVIRONMENT},
        "results": found.table,
        "averages": found.averages,
        "curves": training_curves(events.steps, learned),
        "validation": validation_looks(events, learned),
        "metric_names": metric_names(events, learned),
        "mixture": _mixture(plan, events, learned),
        "adapter": adapter,
        "gradients": mean_cosine(events.gradients),
        "rows": answered(tasks, found.results),
        "notes": notes,
    }


def _summary(
    run: RunFolder,
    recipe: Recipe,
    events: Events,
    adapter: Mapping[str, Any] | None,
    plan: Mapping[str, Any],
    environment: Mapping[str, Any],
    tasks: int,
) -> dict[str, Any]:
    """Speed, share of the floor and the last loss are those of `training_facts`."""
    found, best = training_facts(events.steps) if events.steps else {}, events.best
    shares = [number(step.get("floor_share")) for step in events.steps]
    timed = [share for share in (shares[1:] if len(shares) > 3 else shares) if share is not None]
    return {
        "status": summary(run).status,
        "steps": events.steps[-1]["step"] if events.steps else 0,
        "planned_steps": plan.get("steps"),
        "best": None if best is None else {key: best[key] for key in ("step", "of", "value")},
        "base_model": recipe.base_model,
        "dtype": environment.get("dtype"),
        "quantization": recipe.quantization,
        "method": recipe.adapter.method,
        "rank": recipe.adapter.rank,
        "alpha": recipe.adapter.alpha,
        "up_projections": adapter["up_projections"] if adapter else None,
        "adapted_layers": adapter["adapted_layers"] if adapter else None,
        "parameters": adapter["parameters"] if adapter else None,
        "tasks": tasks,
        **{key: found.get(key) for key in _OF_TRAINING},
        "floor_share": median(timed) if timed else None,
        "device": environment.get("device"),
        "processes": environment.get("processes"),
    }


def _mixture(plan: Mapping[str, Any], events: Events, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Of each task that learns: training examples, its planned share, and what was drawn."""
    planned = plan.get("examples_an_epoch") or {}
    drawn = drawn_examples(events.steps, tasks)
    return [
        {
            "task": task,
            "examples": plan.get("examples", {}).get(task),
            "planned_share": _share(planned, task),
            "drawn": drawn[task] if drawn else None,
            "drawn_share": _share(drawn or {}, task),
        }
        for task in tasks
    ]


def _share(counts: Mapping[str, int], task: str) -> float | None:
    total = sum(counts.values())
    return counts[task] / total if total and task in counts else None


def _adapter(run: RunFolder) -> tuple[dict[str, Any] | None, list[str]]:
    """What `inspect` says of the finished adapter, or of the newest checkpoint's; and remarks."""
    folder, notes = run.adapter, []
    if not folder.is_dir():
        checkpoint = newest_checkpoint(run.checkpoints)
        if checkpoint is None:
            return None, ["no adapter yet: neither gates nor similarities are shown"]
        folder, notes = checkpoint, [f"the adapter is that of the checkpoint {checkpoint.name}"]
    try:
        found = inspect_adapter(read_alone(folder))
    except MtlLoraError as error:
        return None, [f"the adapter cannot be read: {' '.join(str(error).split())}"]
    layers, tasks = found["layers"], len(found["tasks"])
    similarity = found["similarity"]
    if len(layers) * tasks * (found["up_projections"] + 1) > _NUMBERS:
        layers = {}
        notes.append("gates and norms of the layers are too many to be shown")
    if tasks**2 > _NUMBERS:
        similarity = dict.fromkeys(similarity)
        notes.append("the similarities of so many tasks are not shown")
    return {
        "up_projections": found["up_projections"],
        "tasks": found["tasks"],
        "adapted_layers": len(found["layers"]),
        "parameters": found["parameters"]["total"],
        "parameters_by_role": found["parameters"]["by_role"],
        "update_norm": found["update_norm"],
        "similarity": similarity,
        "layers": {
            path: {
                "gates": layer["gates"],
                "norms": {"update": layer["norms"].get("update")},
            }
            for path, layer in layers.items()
        },
        "notes": found["notes"],
    }, notes
