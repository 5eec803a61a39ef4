"""`mtl-lora serve`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from mtl_lora_cli.cli.frame import emit, framed, say, status
from mtl_lora_cli.cli.interrupts import INTERRUPTED
from mtl_lora_cli.cli.options import RUNS, RunsOption


def register(app: typer.Typer) -> None:
    app.command("serve", epilog="Example: mtl-lora serve quickstart --port 8100")(serve)


def serve(
    run: Annotated[
        str | None, typer.Argument(help="Name or path of a run; default: the newest.")
    ] = None,
    runs: RunsOption = RUNS,
    host: Annotated[
        str,
        typer.Option("--host", help="Address; another one than this machine's own needs a token."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8100,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file", metavar="FILE", help="Holds the token of requests; or MTL_LORA_TOKEN."
        ),
    ] = None,
    max_rows: Annotated[int, typer.Option("--max-rows", min=1, help="Of a request.")] = 256,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            "--max-bytes",
            min=1,
            help="Of a request; default: 1 MiB, 16 MiB where tasks show pictures.",
            show_default=False,
        ),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=1, help="Rows that may wait; more get 429.")
    ] = 4096,
    pictures: Annotated[
        Path | None,
        typer.Option(
            "--pictures",
            metavar="FOLDER",
            help="Rows may name pictures by paths below it; others bring them as base64.",
        ),
    ] = None,
    max_pixels: Annotated[int, typer.Option("--max-pixels", min=1, help="Of a picture.")] = 2**24,
    force: Annotated[
        bool, typer.Option("--force", help="Go on although the base model has changed.")
    ] = False,
) -> None:
    """Answer rows of a run's tasks over HTTP, mixed tasks together."""
    with framed():
        from mtl_lora_cli.errors import UsageError
        from mtl_lora_cli.runs.folder import find_run

        folder = find_run(run, runs)
        status("loading libraries")
        try:
            from mtl_lora_cli.serving.pictures import Gallery
            from mtl_lora_cli.serving.server import Server, bound, read_token, require_private
            from mtl_lora_cli.serving.service import Limits, Service
        except ModuleNotFoundError as error:
            raise UsageError(f"serve needs {error.name}: pip install 'mtl-lora[serve]'") from None
        from mtl_lora_cli.evaluation.opened import open_run
        from mtl_lora_cli.evaluation.predict import Predictor

        if pictures is not None and not pictures.is_dir():
            raise UsageError(f"--pictures {pictures}: no such folder")
        token = read_token(token_file)
        require_private(host, token)
        place = bound(host, port)
        status(f"loading run {folder.name}")
        opened = open_run(folder, force=force)
        if opened.of_maps:
            raise UsageError(f"run '{folder.name}': serve answers texts; its answers are maps")
        shows = any(one.template.images for one in opened.tasks)
        if pictures is not None and not shows:
            raise UsageError(f"--pictures: no task of run '{folder.name}' shows pictures")
        most = max_bytes or (2**24 if shows else 2**20)
        service = Service(
            Predictor(opened, pictures),
            folder.name,
            Limits(most, max_rows, max_waiting),
            token,
            Gallery(pictures, max_pixels),
        )
        server = Server(service)
        shown = f"[{host}]" if ":" in host else host
        place.listen(2048)
        emit(f"http://{shown}:{place.getsockname()[1]}")
        server.run(sockets=[place])
        service.close()
        say("stopped; all that was asked has been answered")
    if server.stopped_by == signal.SIGINT:
        raise typer.Exit(INTERRUPTED)
