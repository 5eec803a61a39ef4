"""A run that learned nothing says so: at its end, in its report, and where it is evaluated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtl_lora_cli import resources


def recipe(folder: Path, base: Path, rate: float, steps: int) -> str:
    content: dict[str, Any] = {
        "base_model": str(base),
        "adapter": {"rank": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "tasks": [
            {"name": "search_ads", "template": "samples/search_ads", "source": {"path": "rows"}}
        ],
        "training": {
            "max_steps": steps,
            "epochs": 1000,
            "row_length": 512,
            "rows_per_step": 1,
            "learning_rate": rate,
            "validation": {"every": steps // 2, "examples": 40},
        },
        "run": {"name": "small"},
    }
    samples = resources.bundled("data_templates") / "samples" / "search_ads"
    (folder / "rows").mkdir()
    for split, name in (("train", "train"), ("validation", "test"), ("test", "test")):
        shutil.copy(samples / f"{name}.jsonl", folder / "rows" / f"{split}.jsonl")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return "recipe.yaml"


@pytest.mark.slow
def test_a_rate_of_nothing_is_told(
    invoke: Callable[..., Any], small_model: Path, tmp_path: Path
) -> None:
    trained = invoke("train", recipe(tmp_path, small_model, 1e-9, 4))
    assert trained.returncode == 0, trained.stderr
    said = " ".join(trained.stderr.split())
    assert "note: search_ads: at none of 2 looks were its answers better than a guess" in said
    invoke("report")
    page = (tmp_path / "runs/small/report.html").read_text(encoding="utf-8")
    assert "at none of 2 looks were its answers better than a guess" in page
    told = invoke("eval", "--task", "search_ads")
    (result,) = json.loads(invoke("eval", "--task", "search_ads", "--json").stdout)["results"]
    assert result["one_answer"]["share"] >= 0.95
    assert "nearly all rows get one answer" in " ".join(told.stdout.split())
