"""A loss that is no number: what it has to do with, and what to do next."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from mtl_lora_cli.data.epoch_rows import Place
from mtl_lora_cli.machine.processes import Processes
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.training.drawn import Draw, Drawn
from mtl_lora_cli.training.step import Running


def no_number(
    running: Running[Drawn],
    draw: Draw,
    tasks: Sequence[Task],
    where: Callable[[int, int], str],
    processes: Processes,
    intact: str | None,
) -> str:
    """The step's tasks and the examples, in one line: a collective.

    Args:
        running: the step.
        draw: who drew it.
        tasks: of the run.
        where: names a training example: task id and number → file and line.
        processes: this one among those of the run.
        intact: the last checkpoint's name, if there is one.
    """
    drawn = running.planned
    names = ", ".join(tasks[task].name for task in drawn.examples)
    mine = _poisoned(drawn, running.values, draw)
    found = sorted({place for some in processes.gather(mine) for place in some})
    examples = sum(len(row) for row in drawn.rows)
    if not found:
        seen = "all losses are numbers, but their gradient is not"
    elif len(found) == examples:
        seen = f"of all {examples} examples"
    else:
        told = [f"'{tasks[t].name}' {where(t, n)}" for t, n in found[:3]]
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        seen = f"of {len(found)} of {examples} examples: {', '.join(told)}{more}"
    return (
        f"the loss is no longer a finite number at step {drawn.number + 1} (tasks {names}), {seen}; "
        + (f"{intact} is intact" if intact is not None else "no checkpoint was written yet")
        + "; lower training.learning_rate, or look at these examples"
    )


def _poisoned(drawn: Drawn, values: Sequence[Tensor], draw: Draw) -> list[Place]:
    """This process's examples with a loss that is no number."""
    found = []
    for places, own, owners in zip(drawn.places, values, drawn.owners, strict=True):
        tasks = owners.unique()  # of maps a pass may hold some of the places' tasks
        counts = [int(draw.supervised([[place]], drawn.epoch)[tasks].sum()) for place in places]
        for place, part in zip(places, own.cpu().split(counts), strict=True):
            if not part.isfinite().all():
                found.append(place)
    return found
