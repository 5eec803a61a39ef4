"""`mtl-lora router`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mtl_lora_cli.cli.frame import emit, emit_json, framed, say, status
from mtl_lora_cli.cli.options import RUNS, JsonOption, RunOption, RunsOption


def register(app: typer.Typer) -> None:
    app.command("router", epilog="Example: mtl-lora router --likely 0.8")(router)


def router(
    run: RunOption = None,
    runs: RunsOption = RUNS,
    likely: Annotated[
        float,
        typer.Option("--likely", min=0, max=1, help="Name no task that is less likely than this."),
    ] = 0.5,
    as_json: JsonOption = False,
) -> None:
    """Learn which task a row is of, for predict --task auto, and try it on held-out rows."""
    with framed():
        from mtl_lora_cli.runs.folder import find_run

        folder = find_run(run, runs)
        folder.require_adapter()
        status("loading libraries")
        from mtl_lora_cli.evaluation.opened import Run
        from mtl_lora_cli.evaluation.router import train_router

        found = train_router(Run(folder), likely=likely)
        if as_json:
            emit_json(found)
            return
        emit(_as_table(found))
        say("rows without a task: mtl-lora predict --task auto FILE")


def _as_table(found: dict[str, Any]) -> str:
    from mtl_lora_cli.cli.table import table

    rows = [_row(name, one) for name, one in found["by_task"].items()]
    return table(
        ("task", "held-out rows", "right", "named", "right of named"), [*rows, _row("all", found)]
    )


def _row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    shares = (one[key] for key in ("accuracy", "named", "accuracy_of_named"))
    return (name, f"{one['rows']:,}", *("–" if v is None else f"{v:.1%}" for v in shares))
