"""Options that several commands take, so that they read alike everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtl_lora_cli.cli.completion import complete_run, complete_task

RunOption = Annotated[
    str | None,
    typer.Option(
        "--run",
        help="Name or path of a run; default: the newest one.",
        autocompletion=complete_run,
    ),
]
RunsOption = Annotated[
    Path, typer.Option("--runs", envvar="MTL_LORA_RUNS", help="Folder in which runs lie.")
]
TaskOption = Annotated[
    str,
    typer.Option("--task", help="A task of the run, or 'all'.", autocompletion=complete_task),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
CompareLimitOption = Annotated[
    int, typer.Option("--limit", min=1, help="Held-out rows to compare on.")
]
ToleranceOption = Annotated[
    float | None,
    typer.Option("--tolerance", min=0, help="Largest difference of log-probabilities allowed."),
]
CheckOption = Annotated[
    bool,
    typer.Option("--check/--no-check", help="Load what was written again and compare it."),
]
NoCheckOption = Annotated[
    bool,
    typer.Option("--no-check", help="Do not load what was written again and compare it."),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--check",
        metavar="ENGINE",
        help="vllm: let the engine itself answer, too, all tasks in one batch (see --engine-python).",
    ),
]
EnginePythonOption = Annotated[
    Path | None,
    typer.Option(
        "--engine-python",
        envvar="MTL_LORA_VLLM_PYTHON",
        help="The interpreter of the environment that vLLM is installed in.",
    ),
]
PushOption = Annotated[
    str | None,
    typer.Option("--push", metavar="OWNER/NAME", help="Then upload it to the Hugging Face hub."),
]
RUNS = Path("runs")
