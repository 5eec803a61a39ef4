"""`mtl-lora cache` and `cache prune`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Invoke = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def kept(tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MTL_LORA_CACHE", str(folder))
    for kind, size in (("encoded", 2048), ("trust", 10)):
        (folder / kind).mkdir(parents=True)
        (folder / kind / "entry").write_bytes(b"x" * size)
    return folder


def test_shown_and_pruned(kept: Path, invoke: Invoke) -> None:
    shown = invoke("cache")
    header, _, encoded, trust, whole = shown.stdout.splitlines()
    assert header.split()[:3] == ["kind", "entries", "size"]
    assert encoded.split()[:4] == ["encoded", "1", "2.0", "KiB"]
    assert trust.split()[:4] == ["trust", "1", "10", "B"]
    assert whole.split()[:4] == ["all", "2", "2.0", "KiB"]
    known = json.loads(invoke("cache", "--json").stdout)
    assert (known["folder"], known["limit"]) == (str(kept), 20 * 2**30)
    assert [(one["kind"], one["bytes"]) for one in known["entries"]] == [
        ("encoded", 2048),
        ("trust", 10),
    ]
    assert "1 removed, 10 B" in invoke("cache", "prune", "--kind", "trust", "--size", "0").stderr
    assert "0 removed" in invoke("cache", "prune", "--older-than", "1h").stderr
    (removed,) = json.loads(invoke("cache", "prune", "--older-than", "0h", "--json").stdout)[
        "removed"
    ]
    assert removed["path"] == str(kept / "encoded" / "entry")
    assert [file for file in kept.rglob("*") if file.is_file()] == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "cache prune: say how much may stay (--size 5GiB), or --older-than 30d"),
        (["--size", "lots"], "--size: 'lots' is not a size such as 20GiB or 500MB"),
        (
            ["--size", "0", "--kind", "no"],
            "--kind no: nothing of that kind is kept; there is encoded, trust",
        ),
    ],
)
def test_a_call_that_cannot_be_meant(
    kept: Path, invoke: Invoke, words: list[str], line: str
) -> None:
    finished = invoke("cache", "prune", *words)
    assert (finished.returncode, finished.stdout, finished.stderr) == (2, "", f"error: {line}\n")
    assert len([file for file in kept.rglob("*") if file.is_file()]) == 2


def test_a_limit_that_is_no_size(
    kept: Path, invoke: Invoke, small_recipe: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_LORA_CACHE_SIZE", "plenty")
    line = "error: MTL_LORA_CACHE_SIZE: 'plenty' is not a size such as 20GiB or 500MB\n"
    for words in (["cache"], ["validate", str(small_recipe())]):
        finished = invoke(*words)
        assert (finished.returncode, finished.stderr.splitlines(keepends=True)[-1]) == (2, line)
