"""The command `mtl-lora`: options that all commands share, and the list of commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mtl_lora_cli import extensions
from mtl_lora_cli.cli import (
    add_task,
    bench,
    cache,
    compare,
    data,
    doctor,
    evaluate,
    export,
    frame,
    init,
    inspect,
    merge,
    predict,
    report,
    router,
    runs,
    schema,
    serve,
    tasks,
    train,
    validate,
)
from mtl_lora_cli.cli.once import take_each_once

app = typer.Typer(
    help="Train one LoRA adapter for many tasks, evaluate each task, merge any of them.",
    epilog="First steps: mtl-lora train quickstart; mtl-lora eval --task all; mtl-lora merge --task uses",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train.register(app)
add_task.register(app)
evaluate.register(app)
predict.register(app)
router.register(app)
serve.register(app)
merge.register(app)
export.register(app)
inspect.register(app)
report.register(app)
runs.register(app)
cache.register(app)
validate.register(app)
tasks.register(app)
data.register(app)
bench.register(app)
compare.register(app)
doctor.register(app)
init.register(app)
schema.register(app)
take_each_once(app)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mtl-lora {version('mtl-lora')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and library warnings.")
    ] = False,
    extension: Annotated[
        list[Path] | None,
        typer.Option(
            "--extension",
            metavar="FILE.py",
            help="A Python file that adds a metric, a method, an export format, …",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", "--local-rank", hidden=True)
    ] = None,  # DeepSpeed's launcher says it here, besides in the environment
) -> None:
    frame.set_debug(debug)
    if extension or os.environ.get(extensions.VARIABLE):
        with frame.framed():
            extensions.load_named_extensions()
            extensions.load_extensions(extension or ())
