"""`--num-processes`: a command run by several processes of this host."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from mtl_lora_cli.cli.frame import real_stdout, say

_OPTION = "--num-processes"

ProcessesOption = Annotated[
    int | None,
    typer.Option(_OPTION, min=1, help="Start so many processes on this host, one for each card."),
]


def alone() -> bool:
    """Whether no launcher has started this process as one of several, who tell a fault once."""
    return not {"RANK", "SLURM_STEP_ID"} & os.environ.keys()


def launched(count: int) -> int:
    """Run this command in so many processes; their exit code."""
    from mtl_lora_cli.errors import UsageError
    from mtl_lora_cli.machine.launch import equivalent, launch

    if "RANK" in os.environ:
        raise UsageError(
            f"{_OPTION} starts processes, and this one was started as one of several already; "
            "leave it out under torchrun, accelerate, deepspeed and Slurm"
        )
    arguments = _without_processes(sys.argv[1:])
    say(f"starting {count} processes; the same: {equivalent(arguments, count)}")
    return launch(arguments, count, real_stdout())


def _without_processes(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith(f"{_OPTION}="):
            skip = False
        elif argument == _OPTION:
            skip = True
        else:
            kept.append(argument)
    return kept
