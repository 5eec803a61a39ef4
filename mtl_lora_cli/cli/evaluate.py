"""`mtl-lora eval`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mtl_lora_cli.cli.frame import emit, emit_json, framed, say, status
from mtl_lora_cli.cli.options import RUNS, JsonOption, RunOption, RunsOption, TaskOption

_PAIRED = ("accuracy", "exact_match", "acc")  # what the paired test is about


def register(app: typer.Typer) -> None:
    app.command("eval", epilog="Example: mtl-lora eval --task boolq --limit 200")(evaluate)


def evaluate(
    task: TaskOption,
    run: RunOption = None,
    runs: RunsOption = RUNS,
    split: Annotated[
        str | None, typer.Option("--split", help="train, validation or test; default: test.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first so many rows.")
    ] = None,
    base_only: Annotated[
        bool, typer.Option("--base-only", help="Score the untouched base model instead.")
    ] = False,
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol", help="choices, generate or lm-eval; default: choices if there are any."
        ),
    ] = None,
    normalisation: Annotated[
        str | None,
        typer.Option(
            "--normalisation",
            help="sum, token or character: what a choice's log-probability is divided by; "
            "default: the template's.",
        ),
    ] = None,
    harness_task: Annotated[
        str | None,
        typer.Option(
            "--harness-task",
            help="What lm-evaluation-harness calls the task, or a YAML file like its own.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on although the base model has changed.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Score a run's tasks on held-out rows."""
    with framed():
        from mtl_lora_cli.errors import UsageError, did_you_mean
        from mtl_lora_cli.recipe.schema import SPLITS
        from mtl_lora_cli.runs.folder import find_run

        folder = find_run(run, runs)
        if split is not None and split not in SPLITS:
            raise UsageError(f"--split: expected one of {', '.join(SPLITS)}, received '{split}'")
        status("loading libraries")
        from rich.console import Console
        from rich.progress import Progress

        from mtl_lora_cli.evaluation import evaluate as room
        from mtl_lora_cli.evaluation.open_run import open_run, read_tasks
        from mtl_lora_cli.evaluation.protocols import NORMALISATIONS, PROTOCOLS

        for option, value, known in (
            ("--protocol", protocol, PROTOCOLS),
            ("--normalisation", normalisation, NORMALISATIONS),
        ):
            if value is not None and value not in known:
                raise UsageError(
                    f"{option}: expected one of {', '.join(known)}, received '{value}'"
                    f"{did_you_mean(value, known)}"
                )
        setting = room.Setting(split, limit, base_only, protocol, normalisation, harness_task)
        chosen = room.select_tasks(read_tasks(folder), task)
        rows = room.find_rows(chosen, setting)
        status(f"loading run {folder.name}")
        opened = open_run(folder, force=force)
        if opened.trained_on is not None:
            say("the base model is not the one that the adapter was trained on")
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("scoring", total=None)
            results = room.evaluate(
                opened,
                chosen,
                setting,
                lambda done, total: progress.update(bar, completed=done, total=total),
                rows=rows,
            )
        compared = [
            None if base_only else room.compare_with_base(folder, result) for result in results
        ]
        if as_json:
            emit_json(_as_json(folder.name, results, compared))
        else:
            emit(_as_table(results, compared, base_only))
            if not base_only and None in compared:
                say(
                    "the untouched base model beside it: mtl-lora eval --base-only with the same options"
                )


def _as_json(
    run: str, results: list[dict[str, Any]], compared: list[dict[str, Any] | None]
) -> dict[str, Any]:
    rows = []
    for result, base in zip(results, compared, strict=True):
        row = {key: value for key, value in result.items() if key not in ("gold", "predicted")}
        rows.append({**row, "base": base})
    return {"run": run, "results": rows}


def _as_table(
    results: list[dict[str, Any]], compared: list[dict[str, Any] | None], base_only: bool
) -> str:
    from mtl_lora_cli.cli.table import table

    header = ["task", "metric", "base" if base_only else "score", "95 % interval"]
    header += ["majority"] if base_only else ["base", "p", "majority"]
    rows = []
    for result, base in zip(results, compared, strict=True):
        for number, (name, measured) in enumerate(result["metrics"].items()):
            row = [result["task"] if number == 0 else "", name, _shown(measured["value"])]
            low, high = measured["low"], measured["high"]
            row.append("" if low is None else f"{low:.3f} – {high:.3f}")
            if not base_only:
                row.append(_shown(base["metrics"][name]["value"]) if base else "–")
                row.append(f"{base['p_value']:.2g}" if base and name in _PAIRED else "")
            row.append(_shown(result["majority"]) if name == "accuracy" else "")
            rows.append(row)
    text = table(header, rows)
    examples = ", ".join(f"{r['task']} {r['examples']:,} {r['split']} rows" for r in results)
    protocols = " and ".join(dict.fromkeys(_protocol(result) for result in results))
    notes = [f"{examples}; protocol {protocols}"]
    for result in results:
        if result["unparsable"]:
            notes.append(
                f"{result['task']}: {result['unparsable']} answers could not be read and count as wrong"
            )
    cut = sum(result["truncated_prompts"] or 0 for result in results)
    if cut:
        notes.append(
            f"{cut} prompts were longer than the model's positions and lost their beginning"
        )
    return "\n".join([text, *notes])


def _protocol(result: dict[str, Any]) -> str:
    """The protocol with what decides its figures."""
    if result.get("harness_task"):
        task = result["harness_task"]
        return f"{result['protocol']} ({task['task']}, lm_eval {task['lm_eval']})"
    if result["normalisation"] not in (None, "sum"):
        return f"{result['protocol']} (per {result['normalisation']})"
    return str(result["protocol"])


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
