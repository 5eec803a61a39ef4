"""`mtl-lora doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtl_lora_cli.cli.frame import (
    emit,
    emit_json,
    framed,
    real_stdout,
    status,
    stdout_is_terminal,
)
from mtl_lora_cli.cli.options import RUNS, JsonOption, RunsOption
from mtl_lora_cli.visible import visible

if TYPE_CHECKING:
    from mtl_lora_cli.machine.checks import Check
    from mtl_lora_cli.memory.estimate import Estimate
    from mtl_lora_cli.recipe.load import LoadedRecipe

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def register(app: typer.Typer) -> None:
    app.command("doctor", epilog="Example: mtl-lora doctor my-recipe.yaml --num-processes 2")(
        doctor
    )


def doctor(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe: does it fit this machine, too?")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it: key.path=value …")
    ] = None,
    num_processes: Annotated[
        int, typer.Option("--num-processes", min=1, help="Of the run, on this host.")
    ] = 1,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Check this machine and what is installed, and say what mends it."""
    with framed():
        from mtl_lora_cli.errors import CheckError
        from mtl_lora_cli.machine.checks import Verdict, examine

        loaded = None
        if recipe is not None:
            from mtl_lora_cli.recipe.load import find_recipe, load_recipe

            loaded = load_recipe(find_recipe(recipe), overrides or ())
        checks = examine(runs, lambda name: status(f"checking: {name}"))
        estimate = None
        if loaded is not None:
            status("reading the recipe's data")
            found, estimate = _of_recipe(loaded, num_processes)
            checks += found
        if as_json:
            _emit_as_json(checks, estimate)
        else:
            emit(_shown(checks), styled=True)
            if estimate is not None:
                emit(_memory_table(estimate))
        failed = [check.name for check in checks if check.verdict == Verdict.FAIL]
        if failed:
            raise CheckError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


def _of_recipe(loaded: LoadedRecipe, processes: int) -> tuple[list[Check], Estimate | None]:
    """The recipe's checks stand alone, too: a broken library is told, not raised."""
    from mtl_lora_cli.machine.checks import isolated

    estimates: list[Estimate | None] = []

    def check() -> Iterator[Check]:
        from mtl_lora_cli.memory.estimate import examine_recipe

        checks, estimate = examine_recipe(loaded, processes)
        estimates.append(estimate)
        yield from checks

    checks = isolated("recipe", check)
    return checks, estimates[0] if estimates else None


def _emit_as_json(checks: list[Check], estimate: Estimate | None) -> None:
    from dataclasses import asdict

    content: dict[str, Any] = {"checks": [asdict(check) for check in checks]}
    if estimate is not None:
        content["memory"] = {
            **asdict(estimate),
            "settings": [{"setting": key, "saves": saves} for key, saves in estimate.settings],
            "needed": estimate.needed,
            "fits": estimate.fits,
        }
    emit_json(content)


def _shown(checks: list[Check]) -> str:
    """A table in colours on a terminal, a plain one elsewhere; below it what mends what."""
    mend = [(check.name, check.remedy) for check in checks if check.remedy]
    width = max((len(name) for name, _ in mend), default=0)
    remedies = [f"mend {name.ljust(width)}  {visible(remedy)}" for name, remedy in mend]
    rows = [(check.name, str(check.verdict), visible(check.finding)) for check in checks]
    if stdout_is_terminal():
        return "\n".join([_in_colours(rows), *remedies])
    from mtl_lora_cli.cli.table import table

    return "\n".join([table(("check", "verdict", "finding"), rows, left=True), *remedies])


def _in_colours(rows: list[tuple[str, str, str]]) -> str:
    import os
    from io import StringIO

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("check", "verdict", "finding"):
        found.add_column(column, overflow="fold", no_wrap=column != "finding")
    for name, verdict, finding in rows:
        found.add_row(Text(name), Text(verdict, style=_COLOURS[verdict]), Text(finding))
    width = os.get_terminal_size(real_stdout()).columns or 80
    text = StringIO()
    Console(file=text, force_terminal=True, width=width).print(found)
    return text.getvalue().rstrip("\n")


def _memory_table(estimate: Estimate) -> str:
    """Memory by part at a step's fullest moment; what is not there at that moment has a dash."""
    from mtl_lora_cli.cli.table import table

    gib = 2**30
    rows = [(name, f"{size / gib:.2f}" if size else "–") for name, size in estimate.parts.items()]
    rows += [("needed", f"{estimate.needed / gib:.2f}"), ("free", f"{estimate.free / gib:.2f}")]
    some = "1 row" if estimate.rows == 1 else f"{estimate.rows} rows"
    lines = ["", table(("memory of one process", "GiB"), rows)]
    lines.append(f"a pass of {some} of {estimate.row_length:,} tokens on {estimate.device}")
    return "\n".join(lines + ([estimate.choice] if estimate.choice else []))
