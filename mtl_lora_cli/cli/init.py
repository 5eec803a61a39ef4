"""`mtl-lora init`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from mtl_lora_cli.cli.frame import emit, framed, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtl_lora_cli.tasks.defaults import Choice, Halves
    from mtl_lora_cli.tasks.starter import StarterTask

T = TypeVar("T")


def register(app: typer.Typer) -> None:
    app.command(
        "init",
        epilog="Example: mtl-lora init --base-model smollm2-135m --task animals --task uses "
        "--hardware cpu",
    )(init)


def init(
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="An alias, a folder, a .gguf file, or a hub id."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="NAME[=TEMPLATE][:FILE]",
            help="One task; once for each. Of maps NAME=segmentation:FOLDER and the like.",
        ),
    ] = None,
    hardware: Annotated[
        str | None, typer.Option("--hardware", help="cpu, gpu-24, gpu-80 or multi.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="The file to write.")] = Path(
        "recipe.yaml"
    ),
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing: take the defaults.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write a first recipe, with a comment above every key; asks for what is not said."""
    with framed():
        from mtl_lora_cli.data.map_starter import map_recipe, read_map_task
        from mtl_lora_cli.errors import UsageError
        from mtl_lora_cli.runs.atomic import write_text
        from mtl_lora_cli.runs.paths import require_writable
        from mtl_lora_cli.tasks.starter import HARDWARE, hardware_here, read_task, starter_recipe

        if output.exists() and not force:
            raise UsageError(f"{output} exists; choose another --output, or replace it: --force")
        if not output.resolve().parent.is_dir():
            raise UsageError(f"--output: no such folder: {output.parent}")
        require_writable(output.parent, "--output")
        given = {"--base-model": base_model, "--task": tasks, "--hardware": hardware}
        missing = [option for option, value in given.items() if not value]
        if yes:
            missing = [option for option in missing if option == "--task"]
        if missing and (yes or not sys.stdin.isatty()):
            raise UsageError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
                + ("" if yes else ", and there is no terminal to ask at")
            )
        if hardware is None:
            here = hardware_here()
            kinds = "; ".join(f"{name}: {one.what}" for name, one in HARDWARE.items())
            hardware = here if yes else _asked(f"hardware ({kinds})", here, _hardware)
        hardware = _hardware(hardware)
        if base_model is None:
            usual = HARDWARE[hardware].base_model
            base_model = usual if yes else _asked("base model", usual, _something)
        maps = [read_map_task(text) for text in tasks or ()]
        if any(maps):
            of_maps = [one for one in maps if one is not None]
            if len(of_maps) < len(maps):
                raise UsageError(
                    "--task: maps and texts are learned by different models; no run mixes them"
                )
            if given["--base-model"] is None:
                base_model = "dinov2-small"
            files = map_recipe(base_model, of_maps, output)
            clash = [path for path in files if path != output and path.exists() and not force]
            if clash:
                raise UsageError(f"{clash[0]} exists; replace it: --force")
            for path, text in files.items():
                write_text(path, text)
                emit(str(path if path == output else path.name))
            say(f"next: mtl-lora validate {output}; mtl-lora train {output}")
            return
        if tasks:
            found = [read_task(text) for text in tasks]
        else:
            say(f"templates: {_templates()}")
            question = "tasks, each NAME[=TEMPLATE][:FILE], a space between them"
            found = _asked(question, "animals uses search_ads", _tasks)
        choice = _choice(base_model, found, HARDWARE[hardware].small)
        write_text(output, starter_recipe(base_model, found, hardware, choice, output))
        emit(str(output))
        if choice.hours is not None:
            say(
                f"training takes about {max(1, round(60 * choice.hours))} minutes, with this CPU's cores for itself"
            )
        say(f"next: mtl-lora validate {output}; mtl-lora train {output}")


def _choice(base_model: str, tasks: Sequence[StarterTask], on_cpu: bool) -> Choice:
    """Settings by the size of the model and of the mixture, where both are at hand."""
    from mtl_lora_cli.data.amount import amount, held_out
    from mtl_lora_cli.machine.cores import cores
    from mtl_lora_cli.tasks.defaults import Mixture, choose, parameters_of

    sources = [(task.name, task.rows()) for task in tasks]
    found = amount(sources)
    mixture = None if found is None else Mixture(*found)
    size, looks = parameters_of(base_model), held_out(sources)
    if not on_cpu:
        return choose(size, mixture, held_out=looks)
    halves, flops = _this_cpu()
    count = cores()
    return choose(size, mixture, cores=count, halves=halves, flops=count * flops, held_out=looks)


def _this_cpu() -> tuple[Halves | None, float]:
    """Its instructions for bfloat16, and what products of one core in the wanted dtype reach a second.

    By a thread's own time: what others do on the machine just now says nothing of the hours to come.
    """
    import time

    import torch

    from mtl_lora_cli.machine.cards import multiplies_halves

    halves, size, best = multiplies_halves(), 1024, float("inf")
    square = torch.ones(size, size, dtype=torch.bfloat16 if halves else torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(6):
        began = time.thread_time()
        torch.mm(square, square)
        best = min(best, time.thread_time() - began)
    torch.set_num_threads(threads)
    return halves, 2 * size**3 / max(1e-6, best)


def _asked(question: str, default: str, read: Callable[[str], T]) -> T:
    """Ask until the answer can be read."""
    from mtl_lora_cli.errors import UsageError

    while True:
        try:
            return read(typer.prompt(question, default=default, err=True))
        except UsageError as error:
            say(f"error: {error}")


def _hardware(name: str) -> str:
    from mtl_lora_cli.errors import UsageError, did_you_mean
    from mtl_lora_cli.tasks.starter import HARDWARE

    if name in HARDWARE:
        return name
    raise UsageError(
        f"--hardware: expected one of {', '.join(HARDWARE)}, received '{name}'"
        f"{did_you_mean(name, HARDWARE)}"
    )


def _something(text: str) -> str:
    from mtl_lora_cli.errors import UsageError

    if not text.strip():
        raise UsageError("expected an alias, a folder, a .gguf file, or a hub id")
    return text.strip()


def _tasks(text: str) -> list[StarterTask]:
    from mtl_lora_cli.errors import UsageError
    from mtl_lora_cli.tasks.starter import read_task

    if not text.split():
        raise UsageError("expected at least one task")
    return [read_task(word) for word in text.split()]


def _templates() -> str:
    from mtl_lora_cli.tasks.registry import template_names

    return ", ".join(template_names())
