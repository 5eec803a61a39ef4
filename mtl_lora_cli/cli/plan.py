"""What a recipe would do, as `train`, `train --dry-run` and `validate` show it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mtl_lora_cli.cli.frame import emit, emit_json
from mtl_lora_cli.cli.table import table

if TYPE_CHECKING:
    from mtl_lora_cli.training.prepared import Prepared


def task_rows(prepared: Prepared) -> list[dict[str, Any]]:
    """One entry a task: rows, tokens, its share of the examples drawn, epochs over it."""
    from mtl_lora_cli.data.mixture import planned_epochs
    from mtl_lora_cli.models.host import examples_of

    data = prepared.data
    planned = data.planned()
    epochs = planned_epochs(data.mixture, prepared.total_steps)
    if data.others is not None:
        return [
            {
                "task": task.name,
                "template": task.template_name,
                "objective": task.objective,
                "examples": examples,
                "share": count / sum(planned),
                "epochs": epochs[data.tasks[entry].name],
            }
            for task, examples, count, entry in zip(
                data.tasks, examples_of(data.others), planned, data.entries, strict=True
            )
        ]
    return [
        {
            "task": task.name,
            "template": task.template_name,
            "examples": len(split),
            "tokens": int(split.lengths.sum()),
            "supervised": split.supervised,
            "share": count / sum(planned),
            "epochs": epochs[task.name],
            "audit": audit.to_json(),
        }
        for task, split, audit, count in zip(
            data.tasks, data.splits, data.audits, planned, strict=True
        )
    ]


def findings(prepared: Prepared) -> list[str]:
    """What the audit noticed, and what will not be done, a line each."""
    data = prepared.data
    audited = [
        line
        for task, audit in zip(data.tasks, data.audits, strict=False)
        for line in audit.findings(task.name)
    ]
    left_out = [
        f"{name}: there is no validation split, so training.validation leaves it out"
        for name in prepared.unvalidated
    ]
    from mtl_lora_cli.data.prepare import untrained

    apart = [f"{name}: {why}" for name, why in untrained(data.tasks).items()]
    planned = dict(zip(data.mixture.names, data.planned(), strict=True))
    never = [
        f"{name}: its share of an epoch's {sum(planned.values()):,} examples is none: it is not learned"
        for name, count in planned.items()
        if count == 0
    ]
    return [*data.notes, *audited, *left_out, *apart, *never]


def few_steps(prepared: Prepared) -> list[str]:
    """A line where a run is so short that tasks may stay as they are."""
    from mtl_lora_cli.tasks.defaults import FEW

    steps = prepared.total_steps
    if steps >= FEW:
        return []
    return [
        f"{steps:,} optimiser step{'s' * (steps != 1)}: in fewer than {FEW} a task is often not learned at "
        "all; lower training.rows_per_step, or raise training.epochs"
    ]


def tasks_table(prepared: Prepared) -> str:
    """The mixture as a table, what the audit noticed, and how long the run is."""
    entries = task_rows(prepared)
    of_text = ("rows", "tokens", "supervised") if prepared.data.others is None else ()
    header = ["task", *of_text[:1], "examples", *of_text[1:], "share", "epochs"]
    rows = []
    for entry in entries:
        counts = {"rows": entry["audit"]["rows"], **entry} if of_text else entry
        row = [entry["task"], *(f"{counts[name]:,}" for name in header[1:-2])]
        rows.append([*row, f"{entry['share']:.1%}", f"{entry['epochs']:.2f}"])
    training = prepared.recipe.training
    what = "tokens" if of_text else "places"
    per_step = training.rows_per_step
    per_row = f"row{'s' * (per_step > 1)} of {training.row_length:,} {what}"
    images = prepared.recipe.images
    if not of_text and images is not None:
        height, width = images.shape
        per_row = f"picture{'s' * (per_step > 1)} of {height} x {width}"
    steps = (
        f"{prepared.total_steps:,} optimiser steps of {per_step} {per_row}, {str(prepared.dtype).removeprefix('torch.')} "
        f"on {prepared.device}"
    )
    notes = [f"note: {line}" for line in findings(prepared)]
    memory = [prepared.memory] if prepared.memory else []
    return "\n".join([table(header, rows), *notes, *memory, steps])


def tried_engine(prepared: Prepared) -> dict[str, Any]:
    """Which engine would run, by the self-test."""
    from mtl_lora_cli.models.trial import tried

    if prepared.objective is not None:
        kind = type(prepared.objective).__name__
        return {"engine": "host", "line": f"host: {kind}", "remarks": []}

    names = [task.name for task in prepared.data.tasks]
    config = prepared.recipe.adapter
    return tried(prepared.recipe, prepared.base, config, names, prepared.device, prepared.dtype)


def engine_lines(report: dict[str, Any]) -> list[str]:
    """The same in words."""
    from mtl_lora_cli.models.trial import in_a_line

    return [in_a_line(report), *(f"note: {line}" for line in report.get("remarks", []))]


def emit_plan(prepared: Prepared, as_json: bool) -> None:
    """The resolved recipe, its tasks, and the size of what would be trained, to stdout."""
    from mtl_lora_cli.recipe.load import dump_recipe

    packed, adapter = prepared.build()
    engine = packed.engine_report()
    if as_json:
        emit_json(
            {
                "recipe": prepared.recipe.model_dump(mode="json"),
                "tasks": task_rows(prepared),
                "findings": findings(prepared),
                "steps": prepared.total_steps,
                "memory": prepared.memory,
                "engine": engine,
                "trainable_parameters": adapter.parameter_count(),
            }
        )
        return
    emit(dump_recipe(prepared.recipe))
    emit(tasks_table(prepared))
    for line in engine_lines(engine):
        emit(line)
    emit(f"{adapter.parameter_count():,} trainable parameters")
