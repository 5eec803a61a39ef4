"""`mtl-lora report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtl_lora_cli.cli.completion import complete_run
from mtl_lora_cli.cli.frame import emit, emit_json, framed, say, status
from mtl_lora_cli.cli.options import RUNS, JsonOption, RunsOption


def register(app: typer.Typer) -> None:
    app.command("report", epilog="Example: mtl-lora report mine another --output both.html")(report)


def report(
    run: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names or paths of runs; default: the newest one.", autocompletion=complete_run
        ),
    ] = None,
    runs: RunsOption = RUNS,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", help="Default: report.html in the run's folder; of several runs, here."
        ),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option("--plots", help="Write the plots as PNG files to a folder, too.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write one HTML file about a run, or about several beside each other.

    With --json what it is made of is printed, and no page is written unless --output names one.
    """
    with framed():
        from mtl_lora_cli.runs.folder import find_run

        folders = [find_run(name, runs) for name in run] if run else [find_run(None, runs)]
        folders = list({folder.path.resolve(): folder for folder in folders}.values())
        path = output
        if path is None and not as_json:
            path = folders[0].path / "report.html" if len(folders) == 1 else Path("report.html")
        status("loading libraries")
        from mtl_lora_cli.report.facts import gather
        from mtl_lora_cli.report.page import require_ours, write, write_plots
        from mtl_lora_cli.report.plots import can_be_drawn, plots_of

        if path is not None:
            require_ours(path)
        facts = gather(folders)
        drawn = plots_of(facts) if path is not None or plots is not None else []
        if plots is not None:
            write_plots(drawn, plots)
            say(f"{len(drawn)} plots: {plots}")
        if path is not None:
            write(facts, drawn, path)
            if not can_be_drawn():
                say("no plots: matplotlib is not installed; get it with: pip install matplotlib")
        if as_json:
            emit_json(facts)
        else:
            emit(str(path))
