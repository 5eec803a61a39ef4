"""Names that a shell completes, read from the folder of runs: at once, and never with an error.

A shell asks by running the command with `_MTL_LORA_COMPLETE` set; `mtl-lora --install-completion`
tells it to. Options that stand before the word that is completed say which folder and which run.
"""

from __future__ import annotations

import os
from pathlib import Path

import typer

from mtl_lora_cli.visible import visible


def complete_run(context: typer.Context, incomplete: str) -> list[str]:
    """The runs whose names begin so."""
    from mtl_lora_cli.runs.folder import run_names

    try:
        known = (name for name in run_names(_runs(context)) if visible(name) == name)
        return [name for name in known if name.startswith(incomplete)]
    except OSError:
        return []


def complete_task(context: typer.Context, incomplete: str) -> list[str]:
    """The tasks of the run that `--run` names, or of the newest one, whose names begin so; and `all`."""
    from mtl_lora_cli.errors import MtlLoraError
    from mtl_lora_cli.runs.folder import find_run
    from mtl_lora_cli.runs.listing import task_names

    try:
        known = task_names(find_run(context.params.get("run"), _runs(context)))
    except (MtlLoraError, OSError):
        return []
    return [name for name in ("all", *known) if name.startswith(incomplete)]


def _runs(context: typer.Context) -> Path:
    given = context.params.get("runs") or os.environ.get("MTL_LORA_RUNS")
    return Path(given or "runs")
