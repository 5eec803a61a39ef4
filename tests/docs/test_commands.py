"""What the pages show: all commands parse; those and the Python marked `runs` are run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from mtl_lora_cli.cli.main import app
from mtl_lora_cli.errors import ExitCode

from .pages import PAGES, REPOSITORY, Block, blocks_of

SHOWN = [
    block for page in PAGES for block in blocks_of(page) if block.language in ("console", "sh")
]
# Read a recipe, and with it a base model: here the tiny one, and few steps.
WITH_RECIPE = {("train",), ("validate",), ("data", "show")}
Run = Callable[[list[str]], tuple[int, str]]


def parsed(arguments: list[str]) -> tuple[str, ...]:
    """The names of the command that the arguments reach; its options are checked, nothing is run."""
    command: Any = typer.main.get_command(app)
    context, names, rest = None, [], arguments
    while True:
        context = command.make_context(names[-1] if names else "mtl-lora", rest, parent=context)
        rest = [*getattr(context, "_protected_args", []), *context.args]
        if not rest or not hasattr(command, "resolve_command"):
            return tuple(names)
        name, command, rest = command.resolve_command(context, rest)
        names.append(name)


@pytest.mark.parametrize("block", SHOWN, ids=lambda block: f"{block.page}:{block.line}")
def test_commands_parse(block: Block) -> None:
    for arguments, _ in block.commands:
        assert parsed(arguments), f"{block.page}:{block.line}: {arguments} names no command"


@pytest.mark.parametrize(
    "arguments",
    [["evaluate"], ["eval"], ["eval", "--task", "a", "--limits", "3"], ["tasks", "list"]],
)
def test_what_does_not_exist_does_not_parse(arguments: list[str]) -> None:
    with pytest.raises(Exception, match=r"No such|Missing"):
        parsed(arguments)


@pytest.fixture
def run(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    stories_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[Run]:
    """Runs a command inside this process, on the tiny model, in an empty folder."""
    for name in ("MTL_LORA_RUNS", "MTL_LORA_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path_factory.mktemp("cache")))
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)

    def ended(arguments: list[str]) -> tuple[int, str]:
        command = parsed(arguments)
        if command in WITH_RECIPE:
            arguments = [*arguments, f"base_model={stories_folder}"]
        if command == ("train",):
            arguments.append("training.max_steps=4")
        capfd.readouterr()
        with pytest.raises(SystemExit) as leaving:
            app(arguments, prog_name="mtl-lora")
        written = capfd.readouterr()
        return int(leaving.value.code or 0), written.out + written.err

    yield ended
    os.environ.clear()  # the command's frame sets variables for its own process
    os.environ.update(before)


def holds(output: str, line: str) -> bool:
    """Whether the output has the line; `…` stands for whatever was left out."""
    parts = [part.strip() for part in line.split("…")]
    return any(
        all(part in each for part in parts) and each.strip().startswith(parts[0])
        for each in output.splitlines()
    )


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any({"runs", "fails"} & {*b.words} for b in blocks_of(page))],
    ids=lambda page: page.relative_to(REPOSITORY).as_posix(),
)  # fmt: skip
def test_commands_marked_so_run(page: Path, run: Run, tmp_path: Path) -> None:
    """In the page's order, in one folder. Where a block says `exact`, its lines are compared, too."""
    for block in blocks_of(page):
        for word in block.words:
            if word.startswith("file="):
                file = tmp_path / word.removeprefix("file=")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.text, encoding="utf-8")
        if not {"runs", "fails"} & {*block.words}:
            continue
        if block.language == "python":
            exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {})
            continue
        for arguments, expected in block.commands:
            code, output = run(arguments)
            wanted = ExitCode.USAGE if "fails" in block.words else ExitCode.DONE
            assert code == wanted, f"{block.page}:{block.line}: {arguments}: {output}"
            if "exact" in block.words or "fails" in block.words:
                for line in filter(str.strip, expected.splitlines()):
                    assert holds(output, line), f"{block.page}:{block.line}: '{line}' in {output}"
