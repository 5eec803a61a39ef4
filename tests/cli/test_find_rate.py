"""`train --find-rate`: short runs at several rates, chosen on held-out rows."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mtl_lora_cli.compare.rates import rates_of
from mtl_lora_cli.recipe.training import Parts, PartSettings, Training

Finished = subprocess.CompletedProcess[str]
Invoke = Callable[..., Finished]


def test_all_parts_go_by_one_factor() -> None:
    parts = Parts(up=PartSettings(learning_rate=2e-3), gate=PartSettings(learning_rate=0.0))
    assert rates_of(Training(learning_rate=5e-4, parts=parts), 2) == {
        "training.learning_rate": 1e-3,
        "training.parts.up.learning_rate": 4e-3,
    }


@pytest.mark.slow
@pytest.mark.long
def test_the_best_rate_is_the_one_with_the_best_held_out_score(
    small_recipe: Callable[[], Path], invoke: Invoke, tmp_path: Path
) -> None:
    """Where the next run goes on from what is there: results are read, nothing is trained again."""
    recipe = str(small_recipe())
    words = ("train", recipe, "--find-rate", "training.max_steps=3", "training.learning_rate=4e-3")
    found = json.loads(invoke(*words, "--json").stdout)
    rates = [one["settings"]["training.learning_rate"] for one in found["tried"]]
    assert rates == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    scores = [one["score"] for one in found["tried"]]
    assert found["best"]["training.learning_rate"] == rates[scores.index(max(scores))]
    folder = Path(found["folder"])
    stored = sorted(path.name for path in (tmp_path / folder / "results").iterdir())
    assert len(stored) == 6  # and the base model alone
    for path in (tmp_path / folder / "results").glob("x*.json"):
        assert len(json.loads(path.read_text())["validation"]) == 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / folder).rglob("x*.json")}
    again = invoke(*words)
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert f"take it: mtl-lora train {recipe} training.max_steps=3" in again.stdout
    assert "the base model alone: " in again.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("option", ["--resume", "--dry-run"])
def test_it_goes_alone(small_recipe: Callable[[], Path], invoke: Invoke, option: str) -> None:
    finished = invoke("train", str(small_recipe()), "--find-rate", option)
    assert finished.returncode == 2
    assert finished.stderr == (
        "error: --find-rate goes without --resume, --dry-run and --num-processes\n"
    )
