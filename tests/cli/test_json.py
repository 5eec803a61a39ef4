"""`--json` gives one JSON document on stdout, whatever the libraries say beside it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

Finished = subprocess.CompletedProcess[str]

# Python reads this at its start; it makes a library that every command needs talk while importing.
CHATTY = """\
import os
import sys


class Chatty:
    def find_spec(self, name, path=None, target=None):
        if name in ("accelerate", "datasets", "safetensors"):
            print("chatter: importing", name)
            os.write(1, b"raw chatter\\n")
            os.system("echo chatter of a child")
        return None


sys.meta_path.insert(0, Chatty())
"""

FRAMED = """\
import ctypes, os, subprocess
from mtl_lora_cli.cli.frame import emit_json, framed
with framed():
    {statement}
    emit_json({{"result": [1, "zwölf"]}})
    {statement}
"""

TALKERS = {
    "print": "print('chatter')",
    "print without a line end": "print('chatter', end='')",
    "file descriptor": "os.write(1, b'chatter')",
    "child process": "subprocess.run(['echo', 'chatter'])",
    "C library": r"ctypes.CDLL(None).printf(b'chatter\n')",
    "deepspeed": "import deepspeed",
}


@pytest.fixture
def chatty(tmp_path: Path) -> dict[str, str]:
    """An environment in which libraries print to stdout."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(CHATTY, encoding="utf-8")
    return {"PYTHONPATH": str(tmp_path / "site")}


@pytest.mark.parametrize("talker", TALKERS)
def test_what_a_library_prints_stays_out_of_stdout(
    talker: str, environment: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    if talker == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    finished = subprocess.run(
        [sys.executable, "-c", FRAMED.format(statement=TALKERS[talker])],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout) == {"result": [1, "zwölf"]}
    if talker != "deepspeed":
        assert "chatter" in finished.stderr


def test_what_a_library_prints_at_exit_stays_out_of_stdout(
    command: Callable[..., Finished], tmp_path: Path
) -> None:
    talk = "import atexit\natexit.register(print, 'chatter at exit')\n"
    (tmp_path / "sitecustomize.py").write_text(talk, encoding="utf-8")
    finished = command("tasks", "--json", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert json.loads(finished.stdout)
    assert "chatter at exit" in finished.stderr


def test_train(small_run: tuple[Path, Finished]) -> None:
    run, finished = small_run
    assert json.loads(finished.stdout) == {"run": "small", "path": "runs/small"}
    assert (run / "adapter" / "mtl_lora.safetensors").is_file()


def test_dry_run(
    small_recipe: Callable[[], Path],
    command: Callable[..., Finished],
    chatty: dict[str, str],
) -> None:
    recipe = small_recipe()
    finished = command("train", recipe.name, "--dry-run", "--json", cwd=recipe.parent, **chatty)
    plan = json.loads(finished.stdout)
    assert "chatter" in finished.stderr
    assert [task["task"] for task in plan["tasks"]] == ["warm", "cold"]
    assert [task["examples"] for task in plan["tasks"]] == [12, 12]
    assert plan["recipe"]["training"]["max_steps"] == plan["steps"] == 6
    assert plan["trainable_parameters"] > 0
    assert not (recipe.parent / "runs").exists()


def test_eval(fresh_run: Path, command: Callable[..., Finished], chatty: dict[str, str]) -> None:
    finished = command("eval", "--task", "all", "--json", cwd=fresh_run.parent.parent, **chatty)
    assert finished.returncode == 0, finished.stderr
    assert "chatter" in finished.stderr
    report = json.loads(finished.stdout)
    assert report["run"] == "small"
    assert [result["task"] for result in report["results"]] == ["warm", "cold"]
    for result in report["results"]:
        accuracy = result["metrics"]["accuracy"]
        assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1
        assert result["examples"] == 6
        assert result["base"] is None, "the base model has not been asked yet"


def test_merge(
    small_run: tuple[Path, Finished],
    command: Callable[..., Finished],
    chatty: dict[str, str],
    tmp_path: Path,
) -> None:
    run, _ = small_run
    arguments = ("merge", "--task", "warm", "--json", "--output", "merged", "--run", str(run))
    finished = command(*arguments, cwd=tmp_path, **chatty)
    assert finished.returncode == 0, finished.stderr
    assert "chatter" in finished.stderr
    (merged,) = json.loads(finished.stdout)
    assert (merged["task"], merged["path"]) == ("warm", "merged")
    assert merged["equal_answers"] == 1
    assert merged["largest_difference"] < 1e-3
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_tasks(invoke: Callable[..., Finished]) -> None:
    names = [task["name"] for task in json.loads(invoke("tasks", "--json").stdout)]
    assert "glue/sst2" in names


def test_validate(small_recipe: Callable[[], Path], invoke: Callable[..., Finished]) -> None:
    finished = invoke("validate", str(small_recipe()), "--json")
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["valid"] is True
