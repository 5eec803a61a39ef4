"""`mtl-lora merge`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from mtl_lora_cli.cli.frame import framed, say, status
from mtl_lora_cli.cli.maps_outputs import merge_maps_of, of_maps
from mtl_lora_cli.cli.options import (
    RUNS,
    CheckOption,
    CompareLimitOption,
    JsonOption,
    PushOption,
    RunOption,
    RunsOption,
    TaskOption,
    ToleranceOption,
)
from mtl_lora_cli.cli.outputs import emit_written, outputs_of, push_written, require_pushable
from mtl_lora_cli.cli.run_tasks import (
    DensityOption,
    JoinOption,
    ScoresOption,
    SeedOption,
    WeightsOption,
    joined_run,
    show_scores,
)


def register(app: typer.Typer) -> None:
    app.command("merge", epilog="Example: mtl-lora merge --task piqa --output merged/piqa")(merge)


def merge(
    task: TaskOption,
    run: RunOption = None,
    runs: RunsOption = RUNS,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder to write; default: merged/RUN/TASK.")
    ] = None,
    base: Annotated[
        str,
        typer.Option(
            "--base",
            help="original: the full-precision weights. dequantized: those a quantised run saw.",
        ),
    ] = "original",
    weights: WeightsOption = None,
    way: JoinOption = "linear",
    density: DensityOption = 0.5,
    seed: SeedOption = 0,
    scores: ScoresOption = False,
    limit: CompareLimitOption = 32,
    tolerance: ToleranceOption = None,
    check: CheckOption = True,
    push: PushOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fold a task's adapter into the base weights: an ordinary transformers model.

    Several tasks with commas between are joined first (`tasks join`), and the joined adapter is merged.
    """
    joint = None
    with framed(), ExitStack() as beside:
        from mtl_lora_cli.errors import UsageError, did_you_mean
        from mtl_lora_cli.runs.folder import find_run

        folder = find_run(run, runs)
        if check:
            from mtl_lora_cli.export.check_start import ready

            beside.enter_context(ready())
        status("loading libraries")
        from mtl_lora_cli.evaluation.opened import open_run
        from mtl_lora_cli.export.formats.merged import BASES, Merged
        from mtl_lora_cli.export.order import Options
        from mtl_lora_cli.export.write import write_tasks

        if base not in BASES:
            raise UsageError(
                f"--base: expected {' or '.join(BASES)}, received '{base}'{did_you_mean(base, BASES)}"
            )
        several = [name.strip() for name in task.split(",")]
        if len(several) > 1:
            joint = joined_run(folder, several, weights, way, density, seed)
            own, folder, task = folder, joint, several[0]
            output = output or Merged().root / joint.name
        elif weights is not None or scores or way != "linear":
            raise UsageError("--weights, --join and --scores go with several tasks: --task a,b")
        if of_maps(folder):
            if base != "original":
                raise UsageError(
                    "--base dequantized is for text; maps are merged into the original weights"
                )
            merge_maps_of(
                folder, task, output, limit=limit, check=check, push=push, as_json=as_json
            )
            return
        targets = outputs_of(folder, task, output, Merged().root, verb="merge")
        require_pushable(push, targets, check)
        options = Options(base=base, limit=limit, tolerance=tolerance, checked=check)
        results = write_tasks(Merged.name, open_run(folder), targets, options, say)
        push_written(results, push)
        emit_written(results, as_json)
    if scores and joint is not None:
        show_scores(joint, own, limit)
