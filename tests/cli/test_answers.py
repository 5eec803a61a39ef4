"""Answers as the commands count, read and show them: small tasks that once went wrong in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_tokenizer

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


@pytest.mark.slow
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
    merged = invoke("merge", "--task", "a").stdout
    assert "equal answers 100.0%; accuracy 1.000 " in merged
    (beside,) = json.loads(
        invoke("eval", "--task", "a", "--against", "merged/own/a", "--json").stdout
    )["results"]
    assert (beside["beside"]["metrics"]["accuracy"]["value"], beside["beside"]["equal"]) == (1, 1)


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


@pytest.mark.slow
def test_the_positive_class_is_1_and_every_table_names_it(
    lay_out: Callable[..., None], invoke: Callable[..., Finished], tmp_path: Path
) -> None:
    """Labels listed 1 first: F1 of five right answers of six is 2 · 5 / (5 + 6)."""
    template = 'prompt: "{{ text }}"\nlabel: label\nchoices: {1: "yes", 0: "no"}\nmetrics: [f1, accuracy]\n'
    train = [{"text": "a", "label": 1}, {"text": "b", "label": 1}]
    test = [{"text": f"w{number}", "label": 1} for number in range(5)]
    lay_out(template, train=train, validation=test, test=[*test, {"text": "z", "label": 0}])
    trained = invoke(
        "train", "recipe.yaml", "training.max_steps=12", "training.learning_rate=0.02",
        "training.validation={every: 12}",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "(f1 (yes) 1.000)" in trained.stderr
    table = invoke("eval", "--task", "a").stdout
    assert "a     f1 (yes)  0.909" in table
    (result,) = json.loads(invoke("eval", "--task", "a", "--json").stdout)["results"]
    assert result["metrics"]["f1"]["value"] == pytest.approx(10 / 11)
    assert (result["positive"], result["titles"]["f1"]) == (0, "f1 (yes)")
    assert "f1 (yes)" in invoke("runs", "show", "own").stdout
    (generated,) = json.loads(
        invoke("eval", "--task", "a", "--protocol", "generate", "--json").stdout
    )["results"]
    assert generated["positive"] == 0
    assert "; f1 (yes) 0.909" in invoke("merge", "--task", "a").stdout
    card = (tmp_path / "merged" / "own" / "a" / "README.md").read_text(encoding="utf-8")
    assert card.count("| model | f1 (yes) | accuracy") == 2
    assert invoke("report").returncode == 0
    (page,) = tmp_path.glob("runs/own/*.html")
    assert page.read_text(encoding="utf-8").count("f1 (yes)") >= 2


TWO = """\
base_model: {base_model}
adapter: {{method: lora, rank: 4, target_modules: [q_proj, v_proj]}}
tasks:
  - {{name: one, template: task.yaml, source: rows}}
  - {{name: two, template: task.yaml, source: other}}
training: {{epochs: 20, max_steps: 2, learning_rate: 1.0e-3, row_length: 128, rows_per_step: 1}}
run: {{name: own}}
"""
YES_NO = 'prompt: "{{ text }}"\nlabel: label\nchoices: {0: "no", 1: "yes"}\n'
LABELLED = [{"text": "a fine film", "label": 1}, {"text": "dull", "label": 0}]


def test_one_task_without_test_rows_does_not_stop_the_others(
    lay_out: Callable[..., None], invoke: Callable[..., Finished], tmp_path: Path
) -> None:
    lay_out(YES_NO, recipe=TWO, train=LABELLED, test=LABELLED)
    (tmp_path / "other").mkdir()
    text = (tmp_path / "rows" / "train.jsonl").read_text(encoding="utf-8")
    (tmp_path / "other" / "train.jsonl").write_text(text, encoding="utf-8")
    assert invoke("train", "recipe.yaml").returncode == 0
    why = "its source has no test or validation split"
    finished = invoke("eval", "--task", "all")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == f"two is left out: {why}"
    assert "one   accuracy" in finished.stdout
    found = json.loads(invoke("eval", "--task", "all", "--json").stdout)
    assert [one["task"] for one in found["results"]] == ["one"]
    assert found["left_out"] == {"two": why}
    alone = invoke("eval", "--task", "two")
    assert (alone.returncode, alone.stdout) == (2, "")
    assert f"error: task 'two': {why}" in alone.stderr
    none = invoke("eval", "--task", "all", "--split", "validation")
    assert (none.returncode, none.stdout) == (2, "")
    assert "its source has no validation split" in none.stderr


def test_a_protocol_that_does_not_fit_one_task_leaves_it_out(
    lay_out: Callable[..., None], invoke: Callable[..., Finished], tmp_path: Path
) -> None:
    recipe = TWO.replace("task.yaml, source: other", "free.yaml, source: rows")
    lay_out(YES_NO, recipe=recipe, train=LABELLED, test=LABELLED)
    free = 'description: x\nprompt: "{{ text }}"\nanswer: "{{ label }}"\n'
    (tmp_path / "free.yaml").write_text(free, encoding="utf-8")
    assert invoke("train", "recipe.yaml").returncode == 0
    finished = invoke("eval", "--task", "all", "--protocol", "choices")
    assert finished.returncode == 0, finished.stderr
    assert "two is left out: its template " in finished.stdout
    assert "has free answers; the protocol 'choices' scores choices" in finished.stdout


def test_a_task_that_stands_only_in_the_test_file_is_told(
    lay_out: Callable[..., None], invoke: Callable[..., Finished]
) -> None:
    train = [{**row, "kind": "film"} for row in LABELLED]
    test = [*train, *({**row, "kind": "book"} for row in LABELLED)]
    recipe = RECIPE.replace("source: rows", "source: {{path: rows, task_column: kind}}")
    lay_out(YES_NO, recipe=recipe, train=train, test=test)
    why = "2 test rows are of it, and no training row: it is neither learned nor evaluated"
    assert f"note: book: {why}" in invoke("validate", "recipe.yaml").stdout
    assert invoke("train", "recipe.yaml").returncode == 0
    finished = invoke("eval", "--task", "all")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == f"book is left out: {why}"


def test_right_answers_that_cannot_be_read_are_counted(
    lay_out: Callable[..., None], invoke: Callable[..., Finished]
) -> None:
    """A short answer can be generated, one that has more tokens than are allowed can not."""
    rows = [{"text": "a", "label": "red"}, {"text": "b", "label": "a very long and dull answer"}]
    lay_out(
        'prompt: "{{ text }}"\nanswer: "{{ label }}"\ngenerate: {max_new_tokens: 4}\n',
        train=rows,
        test=rows,
    )
    assert invoke("train", "recipe.yaml").returncode == 0
    finished = invoke("eval", "--task", "a")
    assert "a: 1 of 2 right answers cannot be generated so that they are read" in finished.stdout


def test_equal_scores_are_counted(
    lay_out: Callable[..., None],
    invoke: Callable[..., Finished],
    stories_folder: Path,
    tmp_path: Path,
) -> None:
    """Two tokens with the same rows in the model: whatever it learns elsewhere, they score alike."""
    folder = tmp_path / "model"
    shutil.copytree(stories_folder, folder)
    tokenizer = load_tokenizer(find_base_model(str(folder)))
    (one, other), choices = zip(*pairs_of_one_token(tokenizer), strict=True)
    weights = load_file(folder / "model.safetensors")
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(weights):
        weights[name][other] = weights[name][one]
    (folder / "model.safetensors").chmod(0o644)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    template = f'prompt: "{{{{ text }}}}"\nlabel: label\nchoices: {json.dumps(choices)}\n'
    lay_out(template, train=LABELLED, test=LABELLED)
    assert invoke("train", "recipe.yaml", f"base_model={folder}").returncode == 0
    finished = invoke("eval", "--task", "a")
    expected = "a: in 2 of 2 rows the highest score stands twice; the first choice counts"
    assert expected in finished.stdout


def pairs_of_one_token(tokenizer: Any) -> list[tuple[int, str]]:
    """Two words that are one token each behind a prompt."""
    _, (tokens,) = Encoder(tokenizer, "plain").continuations(["x"], [["the", "and", "was", "to"]])
    found = zip(tokens, ("the", "and", "was", "to"), strict=True)
    return [(own[0], word) for own, word in found if len(own) == 1][:2]
