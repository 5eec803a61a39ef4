"""`inspect`, for people, for machines, and as a picture."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Finished = subprocess.CompletedProcess[str]


def test_a_run_is_inspected(
    invoke: Callable[..., Finished], small_run: tuple[Path, Finished], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    run, _ = small_run
    finished = invoke("inspect", "--runs", str(run.parent), "--output", "adapter.png")
    assert finished.returncode == 0, finished.stderr
    first, sizes, _, _, warm, cold = finished.stdout.splitlines()
    assert first.startswith("small: mtl-lora, rank 8, ")
    assert "task_embedding 32" in sizes
    assert warm.split()[0] == "warm" and "cold" in warm
    assert cold.split()[0] == "cold" and "warm" in cold
    assert "drawn: adapter.png" in finished.stderr
    assert (tmp_path / "adapter.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_one_document(
    invoke: Callable[..., Finished], small_run: tuple[Path, Finished]
) -> None:
    run, _ = small_run
    finished = invoke("inspect", "--run", str(run), "--json")
    content = json.loads(finished.stdout)
    assert (content["run"], content["method"]) == ("small", "mtl-lora")
    assert content["tasks"] == ["warm", "cold"]
    assert len(content["similarity"]["updates"]) == len(content["similarity"]["gates"]) == 2
    for layer in content["layers"].values():
        assert sum(layer["gates"]["warm"]) == pytest.approx(1, abs=1e-6)
