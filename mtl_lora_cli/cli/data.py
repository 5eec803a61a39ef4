"""`mtl-lora data show`: what the model reads, token by token."""

from __future__ import annotations

from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtl_lora_cli.cli.frame import emit, framed, status, stdout_is_terminal
from mtl_lora_cli.cli.show_maps import show_maps
from mtl_lora_cli.visible import visible

if TYPE_CHECKING:
    from mtl_lora_cli.training.prepared import Prepared

_SUPERVISED = ("\x1b[1;32m", "\x1b[0m")  # bold green on a terminal
_PLAIN = ("⟦", "⟧")  # elsewhere


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Look at the data as the model reads them.",
        no_args_is_help=True,
        epilog="Example: mtl-lora data show quickstart --packed",
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    group.callback()(_data)
    group.command("show", epilog="Example: mtl-lora data show quickstart --task animals")(show)
    app.add_typer(group, name="data")


def _data() -> None:
    """Look at the data as the model reads them."""


def show(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a bundled recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it: key.path=value …")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="A task of the recipe.")] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="How many examples or rows.")] = 3,
    packed: Annotated[
        bool, typer.Option("--packed", help="Whole packed rows, with segments and task ids.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FOLDER",
            help="Of maps: where pictures are written; default: shown.",
        ),
    ] = None,
) -> None:
    """Print tokens; those that count in the loss are green, or stand in ⟦ ⟧ without a terminal.

    Of maps, pictures with their maps are written: whole, and as the first steps see them.
    """
    with framed():
        from mtl_lora_cli.recipe.load import find_recipe, load_recipe

        loaded = load_recipe(find_recipe(recipe), overrides or ())
        status("loading libraries")
        from mtl_lora_cli.errors import UsageError
        from mtl_lora_cli.tasks.chosen import select_tasks
        from mtl_lora_cli.tasks.maps import MAPS
        from mtl_lora_cli.training.prepare import prepare

        prepared = prepare(loaded)
        if prepared.data.tasks[0].objective in MAPS:
            if packed:
                raise UsageError("--packed is for texts; a row of these tasks is one picture")
            chosen = select_tasks(prepared.data.tasks, task or "all")
            show_maps(prepared, chosen, count, output or Path("shown"))
            return
        if output is not None:
            raise UsageError("--output is for maps; tokens go to stdout")
        if prepared.objective is not None:
            raise UsageError(
                f"data show is for text; the recipe's tasks are of another kind ({prepared.data.tasks[0].objective})"
            )
        chosen = select_tasks(prepared.data.tasks, task or "all")
        if packed:
            _show_rows(prepared, {one.id for one in chosen}, count)
            return
        for one in chosen:
            for number in range(min(count, len(prepared.data.splits[one.id]))):
                emit(f"--- {one.name}, example {number}")
                emit(_marked(prepared, one.id, number), styled=True)


def _show_rows(prepared: Prepared, wanted: set[int], count: int) -> None:
    """The first rows of epoch 0 that hold one of the wanted tasks."""
    from mtl_lora_cli.data.collate import laid_out

    data = prepared.data
    rows = [row for row in data.mixture.first_rows() if any(task in wanted for task, _ in row)]
    for number, row in enumerate(rows[:count]):
        laid = laid_out([row], data.splits, share=data.shares)
        what, length = "examples" if data.shares else "segments", data.mixture.row_length
        emit(f"=== row {number}: {len(row)} {what}, {len(laid.tokens)} of {length} positions")
        for (task, example), path in zip(row, laid.paths, strict=True):
            emit(f"--- positions {_runs(path)}, task id {task} ({data.tasks[task].name})")
            emit(_marked(prepared, task, example), styled=True)


def _runs(path: Any) -> str:
    """`0 to 39, 80 to 95`: positions, ascending, as runs without a gap."""
    runs: list[list[int]] = []
    for place in path.tolist():
        if runs and place == runs[-1][1] + 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    return ", ".join(f"{first} to {last}" for first, last in runs)


def _marked(prepared: Prepared, task: int, number: int) -> str:
    """An example token by token, `|` between them, the supervised ones marked."""
    split = prepared.data.splits[task]
    tokens = split.example(number).tolist()
    learned = set(split.learned(number, prepared.recipe.training.loss_on).tolist())
    before, after = _SUPERVISED if stdout_is_terminal() else _PLAIN
    # By what each token adds: some tokenizers lose a space when a token is decoded alone.
    whole = [prepared.tokenizer.decode(tokens[:end]) for end in range(len(tokens) + 1)]
    texts = [visible(longer[len(shorter) :]) for shorter, longer in pairwise(whole)]
    parts: list[str] = []
    for token, some in groupby(enumerate(tokens), key=lambda one: one[1]):
        places = [place for place, _ in some]
        if token == split.picture_token:  # never learned
            parts.append(f"{texts[places[0]].strip()} × {len(places)}")
            continue
        parts += [
            f"{before}{texts[place]}{after}" if place in learned else texts[place]
            for place in places
        ]
    return "|".join(parts)
