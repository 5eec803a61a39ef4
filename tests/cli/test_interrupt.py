"""Ctrl-C loses nothing: code 130, a whole checkpoint, and the same adapter in the end."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Finished = subprocess.CompletedProcess[str]

STEPS = 40
SETTINGS = (f"training.max_steps={STEPS}", "training.checkpoint_every=null")


def _events(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended early: {process.communicate()}"
        assert time.monotonic() < deadline, "nothing happened in two minutes"
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.long
def test_an_interrupted_run_resumes_to_the_same_adapter(
    small_recipe: Callable[[], Path],
    command: Callable[..., Finished],
    started: Callable[..., subprocess.Popen[str]],
) -> None:
    recipe = small_recipe()
    folder = recipe.parent
    whole, cut = folder / "runs" / "whole", folder / "runs" / "cut"
    finished = command("train", recipe.name, *SETTINGS, "run.name=whole", cwd=folder)
    assert finished.returncode == 0, finished.stderr

    process = started("train", recipe.name, *SETTINGS, "run.name=cut", cwd=folder)
    _wait_for(lambda: len(_events(cut)) >= 3, process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stdout == ""
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in stderr

    done = len(_events(cut))
    assert 3 <= done < STEPS
    assert re.search(rf"stopped after step {done}\b", errors[0])
    (checkpoint,) = (cut / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{done:06d}"
    assert (checkpoint / "COMPLETE").is_file()
    assert not (cut / "adapter").exists()

    resumed = command("train", "--resume", cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    assert f"after step {done}" in resumed.stderr
    for name in ("mtl_lora.safetensors", "mtl_lora_config.json"):
        assert (cut / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()
    same = ("step", "epoch", "loss", "task_loss", "supervised", "learning_rate", "gradient_norm")
    one, other = (
        [{key: event[key] for key in same} for event in _events(run)] for run in (whole, cut)
    )
    assert one == other


WHILE_IMPORTING = """\
import os, signal, sys

class Interrupting:
    wanted = MODULE

    def find_spec(self, name, path=None, target=None):
        if name == self.wanted:
            self.wanted = None
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                if HOW != "dropped":
                    raise ImportError("it cannot be had")

sys.meta_path.insert(0, Interrupting())
from mtl_lora_cli.cli.main import main
main()
"""


@pytest.mark.parametrize("how", ["turned into another error", "dropped"])
@pytest.mark.parametrize("module", ["typer", "mtl_lora_cli.recipe.load", "pydantic", "torch"])
def test_interrupted_in_an_import_that_would_hide_it(
    small_recipe: Callable[[], Path],
    environment: Callable[..., dict[str, str]],
    module: str,
    how: str,
) -> None:
    code = WHILE_IMPORTING.replace("MODULE", repr(module)).replace("HOW", repr(how))
    ended = subprocess.run(
        [sys.executable, "-c", code, "validate", str(small_recipe())],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "error: interrupted\n"


@pytest.mark.slow
def test_interrupted_before_the_first_step(
    small_recipe: Callable[[], Path], started: Callable[..., subprocess.Popen[str]]
) -> None:
    recipe = small_recipe()
    process = started("train", recipe.name, cwd=recipe.parent)
    maps = Path(f"/proc/{process.pid}/maps")
    if not maps.exists():
        pytest.skip("needs /proc to see when the libraries are being loaded")
    deadline = time.monotonic() + 60
    while "libtorch" not in maps.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert stderr.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in stderr
    assert not (recipe.parent / "runs").exists()


@pytest.mark.slow
def test_the_advice_in_an_error_works(
    small_recipe: Callable[[], Path],
    small_run: tuple[Path, Finished],
    invoke: Callable[..., Finished],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`eval` of an unfinished run names a command that finishes it, though a newer one exists."""
    recipe = small_recipe()
    half = recipe.parent / "runs" / "half"
    half.mkdir(parents=True)
    for name in ("recipe.yaml", "tasks.json"):
        text = (small_run[0] / name).read_text(encoding="utf-8")
        (half / name).write_text(text.replace("name: small", "name: half"), encoding="utf-8")
    (half.parent / "latest").write_text("newer\n", encoding="utf-8")
    monkeypatch.chdir(recipe.parent)
    refused = invoke("eval", "--task", "warm", "--run", "half")
    advice = re.search(r"mtl-lora (train .+)", refused.stderr)
    assert advice, refused.stderr
    finished = invoke(*advice.group(1).split())
    assert finished.returncode == 0, finished.stderr
    assert (half / "adapter" / "mtl_lora.safetensors").is_file()
