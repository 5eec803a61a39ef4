"""Running the command: as a process of its own, or inside this one where only its text matters."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..forks import Forks

Finished = subprocess.CompletedProcess[str]

COMMAND = (sys.executable, "-m", "mtl_lora_cli.cli.main")

TEMPLATE = """\
description: Does a word name a color?
prompt: "{{ word }} is a color?"
label: label
choices: {yes: "yes", no: "no"}
"""

SMALL = """\
base_model: {base_model}
adapter:
  dropout: 0.1
  gate: embedding
tasks:
  - name: warm
    template: color.yaml
    source: warm
  - name: cold
    template: color.yaml
    source: cold
training:
  epochs: 100
  max_steps: 6
  learning_rate: 1.0e-2
  row_length: 64
  rows_per_step: 2
  checkpoint_every: 4
run:
  name: small
"""

WORDS = {
    "warm": ("red", "orange", "yellow", "pink", "amber", "gold"),
    "cold": ("blue", "green", "violet", "cyan", "navy", "teal"),
}
OTHERS = ("dog", "cup", "tree", "boat", "king", "bird")


DROPPED = {"MTL_LORA_RUNS", "PYTHONUNBUFFERED", "PYTHONPATH"}  # the caller's own settings


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands keep what they may forget: apart from what they write on demand."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def environment(cache: Path) -> Callable[..., dict[str, str]]:
    """The environment of a command: one thread, no network, a cache of its own."""

    def make(**changes: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
        settled = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MTL_LORA_CACHE": str(cache)}
        return {**kept, **settled, **changes}

    return make


def _default_interrupt() -> None:
    # A shell that runs the tests in the background has made SIGINT ignored for its children.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def command(environment: Callable[..., dict[str, str]]) -> Callable[..., Finished]:
    """`command(*arguments, cwd=…, **environment)` runs a real process to its end."""

    def run(*arguments: str, cwd: Path, **changes: str) -> Finished:
        return subprocess.run(
            [*COMMAND, *arguments],
            cwd=cwd,
            env=environment(**changes),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def cold(environment: Callable[..., dict[str, str]]) -> Iterator[Forks]:
    """`cold.run(*arguments, cwd=…)` is a process that has loaded nothing but the command line."""
    forks = Forks(environment=environment())
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def started(
    environment: Callable[..., dict[str, str]],
) -> Callable[..., subprocess.Popen[str]]:
    """`started(*arguments, cwd=…, stdin=…)` starts a process that the test goes on to watch."""

    def run(*arguments: str, cwd: Path, stdin: int | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=cwd,
            env=environment(),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_default_interrupt,
        )

    return run


@pytest.fixture
def invoke(
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Callable[..., Finished]:
    """The command inside this process, working in `tmp_path`: no second import of torch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MTL_LORA_RUNS", raising=False)
    monkeypatch.setenv("MTL_LORA_CACHE", str(cache))
    # The frame sets these for its own process; here they must not outlive the test.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("BITSANDBYTES_NOWELCOME", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments: str) -> Finished:
        from mtl_lora_cli.cli.app import app

        capfd.readouterr()
        code: int | str | None = 0
        try:
            app(list(arguments), prog_name="mtl-lora")
        except SystemExit as leaving:
            code = leaving.code
        captured = capfd.readouterr()
        assert isinstance(code, int), f"expected an exit code, received {code!r}"
        return subprocess.CompletedProcess(list(arguments), code, captured.out, captured.err)

    return run


@pytest.fixture
def at_a_terminal(
    environment: Callable[..., dict[str, str]],
) -> Iterator[Callable[..., tuple[int, str]]]:
    """`at_a_terminal(arguments, answers, cwd=…)`: exit code and all that stood on the terminal."""
    started: list[subprocess.Popen[bytes]] = []

    def run(
        arguments: list[str], answers: list[tuple[str, str]], *, cwd: Path, **changes: str
    ) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=cwd,
            env=environment(TERM="xterm", COLUMNS="80", **changes),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        started.append(process)
        os.close(theirs)
        text, seen, deadline = "", 0, time.monotonic() + 60
        while time.monotonic() < deadline:
            if answers and answers[0][0] in text[seen:]:
                seen = len(text)
                os.write(ours, answers.pop(0)[1].encode())
            if not select.select([ours], [], [], 0.2)[0]:
                continue
            try:
                read = os.read(ours, 65536)
            except OSError:  # the last one has closed the terminal
                break
            if not read:
                break
            text += read.decode(errors="replace")
        os.close(ours)
        assert not answers, f"never asked {answers[0][0]!r}: {text}"
        return process.wait(timeout=30), text

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def small_recipe(
    stories_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Path]:
    """`small_recipe()` makes a folder of two tiny tasks and a recipe over the tiny model."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("small")
        (folder / "color.yaml").write_text(TEMPLATE, encoding="utf-8")
        for task, words in WORDS.items():
            lines = [f'{{"word": "{word}", "label": "yes"}}\n' for word in words]
            lines += [f'{{"word": "{word}", "label": "no"}}\n' for word in OTHERS]
            (folder / task).mkdir()
            (folder / task / "train.jsonl").write_text("".join(lines), encoding="utf-8")
            (folder / task / "test.jsonl").write_text("".join(lines[3:9]), encoding="utf-8")
        path = folder / "small.yaml"
        path.write_text(SMALL.format(base_model=stories_folder.resolve()), encoding="utf-8")
        return path

    return make


@pytest.fixture(scope="session")
def small_run(
    small_recipe: Callable[[], Path], command: Callable[..., Finished]
) -> tuple[Path, Finished]:
    """A finished run of six steps, `runs/small` in its folder, and what its process printed."""
    recipe = small_recipe()
    finished = command("train", recipe.name, "--json", cwd=recipe.parent)
    assert finished.returncode == 0, finished.stderr
    return recipe.parent / "runs" / "small", finished


@pytest.fixture
def fresh_run(small_run: tuple[Path, Finished], tmp_path: Path) -> Path:
    """A copy of the small run in `runs` of the working directory, as it was when it had been trained."""
    copy = tmp_path / "runs" / "small"
    shutil.copytree(small_run[0], copy, ignore=shutil.ignore_patterns("evaluations"))
    (tmp_path / "runs" / "latest").write_text("small\n", encoding="utf-8")
    return copy
