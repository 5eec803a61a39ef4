"""`runs`, `runs show` and `runs rm` on real runs, and what asks at a terminal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Finished = subprocess.CompletedProcess[str]
Typed = Callable[..., tuple[int, str]]


@pytest.fixture
def runs(fresh_run: Path) -> Path:
    """A folder of runs that holds the small one, an hour old, and what `latest` says."""
    for file in (fresh_run, *fresh_run.rglob("*")):
        os.utime(file, (time.time() - 3600,) * 2)
    return fresh_run.parent


def test_list(runs: Path, invoke: Callable[..., Finished]) -> None:
    finished = invoke("runs")
    assert finished.returncode == 0, finished.stderr
    header, _, row = finished.stdout.splitlines()
    columns = ["run", "status", "step", "tasks", "mean score", "best look", "size", "age"]
    assert re.split(r"\s{2,}", header.strip()) == columns
    assert row.split()[:5] == ["small", "finished", "6/6", "2", "–"]
    (entry,) = json.loads(invoke("runs", "--json").stdout)
    files = [file for file in runs.joinpath("small").rglob("*") if file.is_file()]
    assert entry["bytes"] == sum(file.stat().st_size for file in files)
    assert (entry["status"], entry["checkpoints"]) == ("finished", [4, 6])
    assert (entry["step"], entry["steps"]) == (6, 6)
    assert (entry["tasks"], entry["mean"]) == (["warm", "cold"], None)


def test_no_run_yet(invoke: Callable[..., Finished]) -> None:
    finished = invoke("runs")
    assert (finished.returncode, finished.stdout) == (0, "")
    assert finished.stderr == "no run yet in runs; start one with: mtl-lora train RECIPE\n"
    assert json.loads(invoke("runs", "--json").stdout) == []


def test_show(runs: Path, invoke: Callable[..., Finished]) -> None:
    shown = invoke("runs", "show", "small").stdout
    assert invoke("runs", "show").stdout == shown
    for text in ("finished, 6/6 steps done", "mtl-lora, rank 8", "checkpoints  4, 6", "warm"):
        assert text in shown
    assert "adapter/mtl_lora.safetensors" in shown
    found = json.loads(invoke("runs", "show", "small", "--json").stdout)
    assert found["recipe"]["training"]["max_steps"] == 6
    assert sum(found["files"].values()) == found["bytes"]


def test_a_score_is_shown_after_an_evaluation(runs: Path, invoke: Callable[..., Finished]) -> None:
    (report,) = json.loads(invoke("eval", "--task", "warm", "--json").stdout)["results"]
    accuracy = report["metrics"]["accuracy"]["value"]
    (entry,) = json.loads(invoke("runs", "--json").stdout)
    assert entry["scores"] == {"warm": {"metric": "accuracy", "value": accuracy, "examples": 6}}
    assert f"{accuracy:.3f} (1 of 2)" in invoke("runs").stdout


def test_nothing_heavy_is_imported(runs: Path, environment: Callable[..., dict[str, str]]) -> None:
    code = (
        "import sys\n"
        "from mtl_lora_cli.cli.app import app\n"
        "for words in (['runs'], ['runs', 'show']):\n"
        "    try: app(words)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'accelerate'} & {*sys.modules}\n"
        "print(sorted(heavy), file=sys.stderr)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=runs.parent,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stderr == "[]\n"


def test_remove_without_a_terminal_wants_yes(runs: Path, command: Callable[..., Finished]) -> None:
    finished = command("runs", "rm", "small", cwd=runs.parent)
    assert finished.returncode == 2
    assert finished.stderr == "error: runs rm asks, and there is no terminal; say --yes instead\n"
    assert (runs / "small").is_dir()


def test_remove(runs: Path, invoke: Callable[..., Finished]) -> None:
    finished = invoke("runs", "rm", "small", "--yes")
    assert (finished.returncode, finished.stdout) == (0, "")
    assert finished.stderr == "removed: runs/small\n"
    assert list(runs.iterdir()) == []


def test_an_option_before_the_word_is_not_passed_over(
    runs: Path, invoke: Callable[..., Finished]
) -> None:
    finished = invoke("runs", "--runs", "elsewhere", "rm", "small", "--yes")
    assert finished.returncode == 2
    assert finished.stderr == "error: --runs goes behind the word 'rm'\n"
    assert (runs / "small").is_dir()


@pytest.mark.parametrize(("answer", "left"), [("n\n", True), ("y\n", False), ("\x04", True)])
def test_remove_asks(runs: Path, at_a_terminal: Typed, answer: str, left: bool) -> None:
    code, text = at_a_terminal(
        ["runs", "rm", "small"], [("remove for good?", answer)], cwd=runs.parent
    )
    assert "runs/small: finished, 6/6 steps," in text
    assert (runs / "small").is_dir() == left
    expected = {"n\n": (1, "error: nothing was removed"), "y\n": (0, "removed: runs/small")}
    assert (code, True) == (
        (expected[answer][0], expected[answer][1] in text)
        if answer in expected
        else (130, "error: interrupted" in text)
    )


def test_init_asks_for_what_is_not_said(
    tmp_path: Path, at_a_terminal: Typed, invoke: Callable[..., Finished]
) -> None:
    answers = [
        ("hardware", "cqu\n"),
        ("did you mean 'cpu'", "cpu\n"),
        ("base model", "\n"),
        ("tasks, each", "animal uses\n"),
        ("did you mean 'animals'", "animals mine=uses\n"),
    ]
    code, text = at_a_terminal(["init"], answers, cwd=tmp_path)
    assert code == 0, text
    written = (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    assert invoke("init", "--base-model", "smollm2-135m", "--task", "animals", "--task",
                  "mine=uses", "--hardware", "cpu", "--output", "flags.yaml").returncode == 0  # fmt: skip
    flags = (tmp_path / "flags.yaml").read_text(encoding="utf-8")
    assert _without_time(written) == _without_time(flags)


def _without_time(recipe: str) -> list[str]:
    """All but what follows from this CPU's speed of the moment."""
    return [
        line
        for line in recipe.splitlines()
        if "max_steps" not in line and "on this CPU" not in line
    ]
