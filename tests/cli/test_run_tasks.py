"""`tasks rm`, `tasks join` and `merge --task a,b` as a user calls them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Finished = Any


def test_a_task_leaves_and_the_run_goes_on(
    fresh_run: Path, invoke: Callable[..., Finished], tmp_path: Path
) -> None:
    made = invoke("tasks", "rm", "warm")
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == "runs/small-without-warm"
    assert (tmp_path / "runs/latest").read_text().strip() == "small-without-warm"
    listed = json.loads(invoke("runs", "--json").stdout)
    assert {one["name"]: one["tasks"] for one in listed} == {
        "small": ["warm", "cold"],
        "small-without-warm": ["cold"],
    }
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"word": "pink"}\n')
    before = invoke("predict", "--run", "small", "--task", "cold", "rows.jsonl")
    assert before.stdout == invoke("predict", "rows.jsonl").stdout
    assert invoke("inspect").returncode == 0


def test_joined_scored_and_merged(
    fresh_run: Path, invoke: Callable[..., Finished], tmp_path: Path
) -> None:
    found = invoke(
        "merge",
        "--task",
        "warm,cold",
        "--weights",
        "0.7,0.3",
        "--scores",
        "--limit",
        "4",
        "--no-check",
    )
    assert found.returncode == 0, found.stderr
    assert "joined (linear): warm 0.7, cold 0.3" in found.stderr
    assert (tmp_path / "merged/small-warm-cold/model.safetensors").is_file()
    lines = found.stdout.splitlines()
    assert lines[0] == "merged/small-warm-cold: not checked"
    assert [line.split()[0] for line in lines if line.startswith(("warm ", "cold "))][:2] == [
        "warm",
        "cold",
    ]
    assert any("small" in line and "difference" in line for line in lines)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (("tasks", "rm", "wram"), "unknown task 'wram'; did you mean 'warm'?"),
        (("tasks", "rm", "warm", "cold"), "no task would stay"),
        (("tasks", "join", "warm"), "at least two tasks"),
        (("tasks", "join", "warm", "cold", "--weights", "1"), "expected 2 finite numbers"),
        (("tasks", "join", "warm", "cold", "--join", "sum"), "--join: expected one of linear"),
        (("tasks", "join", "warm", "wram"), "unknown task 'wram'"),
        (("merge", "--task", "warm", "--weights", "1"), "go with several tasks"),
        (("merge", "--task", "warm,warm"), "stands twice"),
    ],
)
def test_what_cannot_be(
    fresh_run: Path, invoke: Callable[..., Finished], call: tuple[str, ...], said: str
) -> None:
    finished = invoke(*call)
    assert (finished.returncode, finished.stdout) == (2, "")
    (line,) = finished.stderr.splitlines()
    assert said in line
    assert [path.name for path in fresh_run.parent.iterdir() if path.is_dir()] == ["small"]


def test_a_router_is_learned_asked_and_exported(
    fresh_run: Path, invoke: Callable[..., Finished], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"word": "pink"}\n{"word": "teal"}\n{"word": "zzz"}\n')
    refused = invoke("predict", "--task", "auto", "rows.jsonl")
    assert refused.returncode == 2
    assert "mtl-lora router --run runs/small" in refused.stderr
    learned = invoke("router")
    assert learned.returncode == 0, learned.stderr
    assert [line.split()[0] for line in learned.stdout.splitlines()[2:]] == ["warm", "cold", "all"]
    found = invoke("predict", "--task", "auto", "rows.jsonl")
    assert found.returncode == 0, found.stderr
    one, two, three = map(json.loads, found.stdout.splitlines())
    assert (one["task"], two["task"], three["task"]) == ("warm", "cold", None)
    assert invoke("export", "--task", "warm", "--no-check").returncode == 0
    assert (tmp_path / "exported/small/router/router.safetensors").is_file()
