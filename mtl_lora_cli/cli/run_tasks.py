"""`mtl-lora tasks rm` and `mtl-lora tasks join`: runs made of a run's tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mtl_lora_cli.cli.completion import complete_task
from mtl_lora_cli.cli.frame import emit, framed, say, status
from mtl_lora_cli.cli.options import RUNS, RunOption, RunsOption

if TYPE_CHECKING:
    from mtl_lora_cli.runs.folder import RunFolder

TaskNames = Annotated[
    list[str],
    typer.Argument(metavar="TASK…", help="Tasks of the run.", autocompletion=complete_task),
]
NameOption = Annotated[
    str | None, typer.Option("--name", help="Of the new run, which lies beside the old one.")
]
WeightsOption = Annotated[
    str | None,
    typer.Option("--weights", help="One for each task, with commas; default: equal ones."),
]
JoinOption = Annotated[
    str,
    typer.Option(
        "--join", help="linear, which is exact; or ties, dare_linear, dare_ties: PEFT's functions."
    ),
]
DensityOption = Annotated[
    float, typer.Option("--density", help="ties, dare: the part of each matrix that is kept.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="dare: of what is dropped.")]
JoinedRankOption = Annotated[
    int | None,
    typer.Option("--rank", min=1, help="Keep at most this rank of what is joined; default: all."),
]
ScoresOption = Annotated[
    bool,
    typer.Option("--scores", help="Then score every task, the run's own adapters beside it."),
]


def register(group: typer.Typer) -> None:
    group.command("rm", epilog="Example: mtl-lora tasks rm piqa --run mine")(remove)
    group.command(
        "join", epilog="Example: mtl-lora tasks join boolq piqa --weights 0.7,0.3 --scores"
    )(join)


def remove(
    tasks: TaskNames, run: RunOption = None, runs: RunsOption = RUNS, name: NameOption = None
) -> None:
    """Make a run without some of a run's tasks; the others are the same to the last bit."""
    with framed():
        from mtl_lora_cli.runs.folder import find_run

        folder = find_run(run, runs)
        folder.require_adapter()
        status("loading libraries")
        from mtl_lora_cli.evaluation.opened import Run
        from mtl_lora_cli.export.derived import without_tasks

        emit(str(without_tasks(Run(folder), tasks, name).path))


def join(
    tasks: TaskNames,
    weights: WeightsOption = None,
    way: JoinOption = "linear",
    density: DensityOption = 0.5,
    seed: SeedOption = 0,
    rank: JoinedRankOption = None,
    run: RunOption = None,
    runs: RunsOption = RUNS,
    name: NameOption = None,
    scores: ScoresOption = False,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="With --scores: the first so many rows.")
    ] = None,
) -> None:
    """Join tasks' adapters to one LoRA: a run in which every task has it."""
    with framed():
        from mtl_lora_cli.runs.folder import find_run

        folder = find_run(run, runs)
        made = joined_run(folder, tasks, weights, way, density, seed, rank, name)
        emit(str(made.path))
    if scores:
        show_scores(made, folder, limit)


def joined_run(
    folder: RunFolder,
    tasks: list[str],
    weights: str | None,
    way: str,
    density: float,
    seed: int,
    rank: int | None = None,
    name: str | None = None,
) -> RunFolder:
    """The run that `tasks join` and `merge --weights` make.

    Raises:
        UsageError: something that was given cannot be.
    """
    folder.require_adapter()
    status("loading libraries")
    from mtl_lora_cli.errors import UsageError
    from mtl_lora_cli.evaluation.opened import open_run
    from mtl_lora_cli.export.joined import join_tasks, parse_weights, require_way

    if len(tasks) < 2:
        raise UsageError(f"expected at least two tasks to join, received {', '.join(tasks)}")
    how = require_way(way, density)
    numbers = parse_weights(weights, len(tasks))
    opened = open_run(folder)
    made = join_tasks(
        opened, tasks, numbers, how=how, density=density, seed=seed, rank=rank, name=name
    )
    said = ", ".join(f"{task} {weight:g}" for task, weight in zip(tasks, numbers, strict=True))
    say(f"joined ({how}): {said}; every task of {made.name} has this adapter")
    return made


def show_scores(made: RunFolder, folder: RunFolder, limit: int | None) -> None:
    """Every task's score with the joined adapter, and with its own beside it."""
    from mtl_lora_cli.cli.evaluate import evaluate

    evaluate(task="all", run=str(made.path), baseline=str(folder.path), limit=limit)
