"""The command answers at once, every help has an example, and `--debug` shows where."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer

from ..forks import Forks

Finished = subprocess.CompletedProcess[str]

HEAVY = ("torch", "transformers", "datasets", "accelerate", "numpy", "pydantic", "yaml", "rich")
AT_ONCE = 0.4  # seconds


def test_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys, mtl_lora_cli.cli.app\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert finished.stdout.split() == []


def _commands(app: typer.Typer, *before: str) -> Iterator[tuple[str, ...]]:
    for entry in app.registered_commands:
        assert entry.name, "each command is named"
        yield (*before, entry.name)
    for group in app.registered_groups:
        assert group.name and group.typer_instance, "each group is named"
        yield (*before, group.name)
        yield from _commands(group.typer_instance, *before, group.name)


def _all_commands() -> list[tuple[str, ...]]:
    from mtl_lora_cli.cli.app import app

    return list(_commands(app))


def test_help_answers_at_once(command: Callable[..., Finished], tmp_path: Path) -> None:
    """By the clock, or, where other processes keep the cores busy, by what it took of them."""
    seconds: list[tuple[float, float]] = []
    for _ in range(5):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        finished = command("--help", cwd=tmp_path)
        clock, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        assert finished.returncode == 0
        used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        seconds.append((clock, used))
        if clock <= AT_ONCE:
            return
    assert min(used for _, used in seconds) <= AT_ONCE, seconds


@pytest.mark.parametrize("words", _all_commands(), ids=" ".join)
def test_every_commands_help_answers_at_once_and_loads_nothing_heavy(
    words: tuple[str, ...], cold: Forks, tmp_path: Path
) -> None:
    for _ in range(5):  # what other processes do shows in a single measurement
        ended = cold.run(*words, "--help", cwd=tmp_path, heavy=HEAVY)
        assert ended.returncode == 0, ended.stderr
        assert set(ended.loaded) <= {"pydantic"}
        assert f"Example: mtl-lora {' '.join(words)} " in ended.stdout
        if ended.seconds <= AT_ONCE:
            return
    assert ended.seconds <= AT_ONCE


def test_no_command_shows_the_help(invoke: Callable[..., Finished]) -> None:
    finished = invoke()
    assert "First steps: mtl-lora train quickstart" in finished.stdout + finished.stderr


def test_version(invoke: Callable[..., Finished]) -> None:
    from importlib.metadata import version

    assert invoke("--version").stdout == f"mtl-lora {version('mtl-lora')}\n"


AT_THE_END = """
import atexit, sys, threading
atexit.register(lambda: print("registered", file=sys.stderr))
end = threading.main_thread().join
threading.Thread(target=lambda: (end(), print("a thread", file=sys.stderr))).start()
sys.argv = ["mtl-lora", "train", "no-such-recipe"]
from mtl_lora_cli.cli.main import main
main()
"""


def test_the_process_ends_at_once_and_in_order() -> None:
    """What others have begun is ended as Python ends it, and the exit code is the command's."""
    ended = subprocess.run(
        [sys.executable, "-c", AT_THE_END], capture_output=True, text=True, check=False
    )
    first, *others = ended.stderr.splitlines()
    assert first.startswith("error: no-such-recipe: no such recipe")
    assert others == ["a thread", "registered"]
    assert (ended.returncode, ended.stdout) == (2, "")


def test_debug_shows_a_traceback(invoke: Callable[..., Finished]) -> None:
    finished = invoke("--debug", "train", "no-such-recipe")
    assert finished.returncode == 2
    assert "Traceback (most recent call last)" in finished.stderr
    assert finished.stderr.splitlines()[-1].startswith("error: no-such-recipe: no such recipe")
    assert finished.stdout == ""


def test_a_full_disk_is_no_internal_error(
    invoke: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        with Path("/dev/full").open("wb") as file:
            file.write(b"x")

    monkeypatch.setattr("mtl_lora_cli.recipe.load.find_recipe", fail)
    finished = invoke("train", "quickstart")
    expected = "error: No space left on device: a disk that was written to (--debug shows where)\n"
    assert (finished.returncode, finished.stderr) == (1, expected)


def test_nor_is_one_that_a_library_without_the_system_s_number_met(
    invoke: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A quota or a limit of a file's size: safetensors raises an error of its own."""
    import resource

    import numpy as np
    from safetensors.numpy import save_file

    def fail(*_: object) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            save_file({"a": np.zeros(1000)}, tmp_path / "a.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr("mtl_lora_cli.recipe.load.find_recipe", fail)
    finished = invoke("train", "quickstart")
    expected = "error: File too large: a disk that was written to (--debug shows where)\n"
    assert (finished.returncode, finished.stderr) == (1, expected)


def test_an_unforeseen_failure_is_one_line_and_code_1(
    invoke: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the sky\nfell down")

    monkeypatch.setattr("mtl_lora_cli.recipe.load.find_recipe", fail)
    finished = invoke("train", "quickstart")
    assert finished.returncode == 1
    assert finished.stdout == ""
    expected = "error: internal error: RuntimeError: the sky fell down (--debug shows where)\n"
    assert finished.stderr == expected
