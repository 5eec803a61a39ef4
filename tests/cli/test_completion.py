"""What a shell asks for when Tab is pressed: names of runs and tasks, at once, and never an error."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Finished = subprocess.CompletedProcess[str]
Completed = Callable[..., list[str]]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for folder, name, tasks in (
        ("runs", "first", ["boolq", "piqa"]),
        ("runs", "fifth", ["sst2", "stsb", "rte"]),
        ("others", "far", ["zebra"]),
    ):
        run = tmp_path / folder / name
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_text("", encoding="utf-8")
        content = {"format_version": 1, "tasks": [{"name": task} for task in tasks]}
        (run / "tasks.json").write_text(json.dumps(content), encoding="utf-8")
        (run.parent / "latest").write_text(f"{name}\n", encoding="utf-8")
    return tmp_path / "runs"


@pytest.fixture
def completed(command: Callable[..., Finished], tmp_path: Path) -> Completed:
    """`completed(words)`: what bash would offer for the last word."""

    def ask(words: str, **changes: str) -> list[str]:
        asked = {
            "_MTL_LORA_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        }
        started = time.perf_counter()
        finished = command(cwd=tmp_path, **asked, **changes)
        assert time.perf_counter() - started < 2.0  # loading torch alone takes longer
        assert (finished.returncode, finished.stderr) == (0, "")
        return finished.stdout.split()

    return ask


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("mtl-lora eval --run ", ["fifth", "first"]),
        ("mtl-lora eval --run fif", ["fifth"]),
        ("mtl-lora eval --runs others --run ", ["far"]),
        ("mtl-lora eval --task ", ["all", "sst2", "stsb", "rte"]),
        ("mtl-lora eval --task s", ["sst2", "stsb"]),
        ("mtl-lora merge --run first --task ", ["all", "boolq", "piqa"]),
        ("mtl-lora export --runs others --task z", ["zebra"]),
        ("mtl-lora predict --task r", ["rte"]),
        ("mtl-lora eval --baseline fi", ["fifth", "first"]),
        ("mtl-lora report first f", ["fifth", "first"]),
        ("mtl-lora runs show f", ["fifth", "first"]),
        ("mtl-lora runs rm fir", ["first"]),
        ("mtl-lora eval --run nothing --task ", []),
        ("mtl-lora eval --runs nowhere --run ", []),
    ],
)
def test_names(completed: Completed, words: str, offered: list[str]) -> None:
    assert completed(words) == offered


@pytest.mark.usefixtures("runs")
def test_the_environment_names_the_folder(completed: Completed) -> None:
    assert completed("mtl-lora eval --run ", MTL_LORA_RUNS="others") == ["far"]


@pytest.mark.parametrize("damage", ["no JSON", '{"format_version": 1}', '{"format_version": 99}'])
def test_damage_offers_nothing(completed: Completed, runs: Path, damage: str) -> None:
    (runs / "fifth" / "tasks.json").write_text(damage, encoding="utf-8")
    assert completed("mtl-lora eval --task ") == []


def test_nothing_heavy_is_imported(runs: Path) -> None:
    code = (
        "import sys, types\n"
        "from mtl_lora_cli.cli.completion import complete_run, complete_task\n"
        "context = types.SimpleNamespace(params={'runs': sys.argv[1], 'run': None})\n"
        "assert complete_run(context, '') and complete_task(context, '')\n"
        "print({'torch', 'numpy', 'pydantic', 'yaml', 'rich'} & {*sys.modules})\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, str(runs)], capture_output=True, text=True, check=True
    )
    assert finished.stdout == "set()\n"
