"""`--task` stands once where it takes one task; of other options the last one counts."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Invoke = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "--task", "a", "--task", "b"),
        ("merge", "--task", "a", "--task", "a"),
        ("export", "--task", "a", "--limit", "3", "--task", "b"),
    ],
)
def test_twice_is_refused(invoke: Invoke, words: tuple[str, ...]) -> None:
    finished = invoke(*words)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.splitlines()[-1] == "Error: --task is given 2 times, expected once."


def test_other_options_may_stand_again(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "kept"))
    for kind in ("encoded", "trust"):
        (tmp_path / "kept" / kind).mkdir(parents=True)
        (tmp_path / "kept" / kind / "one").touch()
    asked = ("cache", "prune", "--older-than", "9d", "--older-than", "0h", "--json", "--json")
    assert invoke(*asked, "--kind", "encoded", "--kind", "trust").returncode == 0
    assert [path for path in (tmp_path / "kept").rglob("*") if path.is_file()] == []
