"""`mtl-lora inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mtl_lora_cli.cli.frame import emit, emit_json, framed, say, status
from mtl_lora_cli.cli.options import RUNS, JsonOption, RunOption, RunsOption


def register(app: typer.Typer) -> None:
    app.command("inspect", epilog="Example: mtl-lora inspect --output adapter.png")(inspect)


def inspect(
    run: RunOption = None,
    runs: RunsOption = RUNS,
    output: Annotated[
        Path | None, typer.Option("--output", help="Draw it, too: a .png, .pdf or .svg file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run's adapter holds: sizes, norms, gates, and how alike its tasks are."""
    with framed():
        from mtl_lora_cli.runs.folder import find_run

        folder = find_run(run, runs)
        folder.require_adapter()
        status("loading libraries")
        from mtl_lora_cli.report.adapter import inspect_run
        from mtl_lora_cli.report.heatmaps import draw, require_plots

        if output is not None:
            require_plots(output)
        content = inspect_run(folder)
        if output is not None:
            draw(content, output)
            say(f"drawn: {output}")
        if as_json:
            emit_json(content)
        else:
            emit(_as_text(content))


def _as_text(content: dict[str, Any]) -> str:
    from mtl_lora_cli.cli.table import table

    tasks, sizes = content["tasks"], content["parameters"]
    header = ["task", "norm", "nearest by update", "cosine", "nearest by gates", "cosine"]
    rows = []
    for number, task in enumerate(tasks):
        norm = (content["update_norm"] or {}).get(task)
        row = [task, "–" if norm is None else f"{norm:.3g}"]
        for kind in ("updates", "gates"):
            row += _nearest(tasks, number, content["similarity"][kind])
        rows.append(row)
    roles = ", ".join(f"{role} {count:,}" for role, count in sizes["by_role"].items())
    return "\n".join(
        [
            f"{content['run']}: {content['method']}, rank {content['rank']}, "
            f"{len(content['layers'])} adapted layers",
            f"{sizes['total']:,} trained values: {roles}",
            table(header, rows),
            *content["notes"],
        ]
    )


def _nearest(tasks: list[str], number: int, cosines: list[list[float | None]] | None) -> list[str]:
    """The most similar other task, and its cosine."""
    row = [] if cosines is None else cosines[number]
    others = [
        (value, place) for place, value in enumerate(row) if value is not None and place != number
    ]
    if not others:
        return ["–", "–"]
    value, place = max(others)
    return [tasks[place], f"{value:.3f}"]
