"""Answers as the commands count, read and show them: small tasks that once went wrong in silence."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

Finished = Any

RECIPE = """\
base_model: {base_model}
adapter: {{method: lora, rank: 4, target_modules: [q_proj, v_proj, o_proj, up_proj, down_proj]}}
tasks:
  - {{name: a, template: task.yaml, source: rows}}
training: {{epochs: 100, max_steps: 4, learning_rate: 1.0e-3, row_length: 128, rows_per_step: 1}}
run: {{name: own}}
"""


@pytest.fixture
def lay_out(tmp_path: Path, stories_folder: Path) -> Callable[..., None]:
    """`lay_out(template, train=[rows], test=[rows])`: a recipe of one task in `tmp_path`."""

    def write(template: str, recipe: str = RECIPE, **splits: list[Mapping[str, Any]]) -> None:
        text = recipe.format(base_model=stories_folder.resolve())
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        (tmp_path / "task.yaml").write_text(f"description: x\n{template}", encoding="utf-8")
        (tmp_path / "rows").mkdir()
        for split, rows in splits.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / "rows" / f"{split}.jsonl").write_text(lines, encoding="utf-8")

    return write


def test_a_choice_that_another_begins_can_be_learned_and_predicted(
    lay_out: Callable[..., None], invoke: Callable[..., Finished], tmp_path: Path
) -> None:
    """Every row says 10: in validation while it learns, in `eval` and in `predict`."""
    rows = [{"text": f"great film {number}", "label": 2} for number in range(1, 5)]
    template = 'prompt: "{{ text }} Rating:"\nlabel: label\nchoices: {1: "1", 2: "10"}\n'
    lay_out(template, train=rows, validation=rows, test=rows)
    trained = invoke(
        "train", "recipe.yaml", "training.max_steps=30", "training.learning_rate=0.02",
        "training.validation={every: 30}",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    events = (tmp_path / "runs" / "own" / "metrics.jsonl").read_text(encoding="utf-8")
    looks = [e for e in map(json.loads, events.splitlines()) if e.get("event") == "validation"]
    assert looks[-1]["metric"] == {"a": 1.0}
    evaluated = invoke("eval", "--task", "a", "--json")
    (result,) = json.loads(evaluated.stdout)["results"]
    assert result["metrics"]["accuracy"]["value"] == 1.0
    assert (result["ends_counted"], result["harness"]["acc"]["value"]) == (4, 0.0)
    said = invoke("predict", "--task", "a", "rows/test.jsonl").stdout
    assert [json.loads(line)["label"] for line in said.splitlines()] == [2] * 4
