"""Answers as the commands count, read and show them: small tasks that once went wrong in silence."""

from __future__ import annotations

import json
import shutil
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


THUMBS = 'prompt: "{{ text }}"\nlabel: label\nchoices: {0: "👎", 1: "👍"}\n'
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.fixture
def without_bytes(stories_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer that has no bytes to fall back to: what it lacks is unknown."""
    folder = tmp_path / "model"
    shutil.copytree(stories_folder, folder)
    path = folder / "tokenizer.json"
    path.chmod(0o644)
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["byte_fallback"] = False
    for byte in BYTES:
        tokenizer["model"]["vocab"].pop(byte, None)
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def test_choices_with_the_same_tokens_are_refused(
    lay_out: Callable[..., None],
    invoke: Callable[..., Finished],
    without_bytes: Path,
    tmp_path: Path,
) -> None:
    """Before training, and where rows that come later have such choices."""
    rows = [{"text": "A good film", "label": 1}, {"text": "A bad film", "label": 0}]
    lay_out(THUMBS, train=rows, test=rows)
    where = f"{tmp_path}/rows/train.jsonl:1"
    expected = (
        f"error: {where}: task 'a': choices: '👎' and '👍' have the same tokens, so the model cannot "
        "tell them apart; give them texts that its tokenizer keeps apart"
    )
    for command in ("validate", "train"):
        finished = invoke(command, "recipe.yaml", f"base_model={without_bytes}")
        assert finished.returncode == 2
        assert finished.stderr.splitlines()[-1] == expected
    assert invoke("validate", "recipe.yaml").returncode == 0, "with bytes they differ"
    template = 'prompt: "{{ text }}"\nlabel: label\nchoices: {each: options}\n'
    (tmp_path / "task.yaml").write_text(f"description: x\n{template}", encoding="utf-8")
    train = [{"text": "one", "options": ["up", "down"], "label": "up"}]
    later = {"text": "two", "options": ["🍎", "🍏", "up"], "label": "up"}
    for split, some in (("train", train), ("test", [*train, later])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / "rows" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    finished = invoke("train", "recipe.yaml", f"base_model={without_bytes}")
    assert finished.returncode == 2
    assert "rows/test.jsonl:2: task 'a': choices: '🍎' and '🍏' have" in finished.stderr
    (tmp_path / "rows" / "test.jsonl").write_text(json.dumps(train[0]) + "\n", encoding="utf-8")
    assert invoke("train", "recipe.yaml", f"base_model={without_bytes}").returncode == 0
    (tmp_path / "later.jsonl").write_text(json.dumps(later) + "\n", encoding="utf-8")
    said = invoke("predict", "later.jsonl")
    assert (said.returncode, said.stdout) == (2, "")
    assert "later.jsonl:1: task 'a': choices: '🍎' and '🍏' have the same tokens" in said.stderr


def test_a_choice_that_begins_another_in_other_letters_is_not_generated(
    lay_out: Callable[..., None], invoke: Callable[..., Finished], tmp_path: Path
) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    lay_out(
        'prompt: "{{ text }}"\nlabel: label\nchoices: ["No", "not sure"]\n', train=rows, test=rows
    )
    assert invoke("train", "recipe.yaml").returncode == 0
    finished = invoke("eval", "--task", "a", "--protocol", "generate")
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1] == (
        f"error: {tmp_path}/rows/test.jsonl:1: task 'a': the choice 'No' begins the choice 'not sure', "
        "so a generated answer cannot tell them apart: use --protocol choices"
    )
