"""Which task can be scored how, and what is said where it cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.evaluate import Setting, held_out
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.recipe.yaml_file import parse_document, validate_document
from mtl_lora_cli.tasks.chosen import select_tasks
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.tasks.template import Template

PREFIX = "label: label\nchoices: {0: 'not', 1: not sure}"
NUMBERS = "label: label\nchoices: {0: zero, 1: one}\nscoring: expectation"
FREE = 'answer: "{{ label }}"'


def task_with(folder: Path, answer: str, split: str = "test") -> Task:
    rows: list[dict[str, Any]] = [{"text": f"row {i}", "label": i % 2} for i in range(4)]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(content, encoding="utf-8")
    text = f'description: x\nprompt: "{{{{ text }}}}"\n{answer}\n'
    return Task(
        name="own",
        id=0,
        template_name="own.yaml",
        template_text=text,
        template=validate_document(parse_document(text, "own.yaml"), Template),
        source=Source(path=str(folder)),
    )


def test_a_choice_that_begins_another_cannot_be_generated(tmp_path: Path) -> None:
    task = task_with(tmp_path, PREFIX)
    with pytest.raises(UsageError) as error:
        held_out(task, Setting(protocol="generate"))
    (line,) = error.value.lines
    assert line.endswith(
        "test.jsonl:1: task 'own': the choice 'not' begins the choice 'not sure', "
        "so a generated answer cannot tell them apart: use --protocol choices"
    )
    assert len(held_out(task, Setting()).examples) == 4


def test_a_free_answer_has_no_choices_to_score(tmp_path: Path) -> None:
    task = task_with(tmp_path, FREE)
    with pytest.raises(UsageError, match=r"has free answers.*use --protocol generate"):
        held_out(task, Setting(protocol="choices"))
    assert Setting().protocol_of(task) == "generate"


@pytest.mark.parametrize(
    ("extract", "why"),
    [
        ("[0-9]", "generate.extract '[0-9]' finds nothing in the answer 'not'"),
        ("not", "generate.extract 'not' finds 'not' in 'not' and in 'not sure', so a generated"),
    ],
)
def test_choices_must_differ_in_what_is_extracted(tmp_path: Path, extract: str, why: str) -> None:
    task = task_with(tmp_path, f"{PREFIX}\ngenerate: {{extract: '{extract}'}}")
    with pytest.raises(UsageError, match=r"test\.jsonl:1: task 'own': ") as error:
        held_out(task, Setting(protocol="generate"))
    assert why in str(error.value)
    held_out(task, Setting())
    task = task_with(tmp_path, f"{PREFIX}\ngenerate: {{extract: 'not.*'}}")
    assert len(held_out(task, Setting(protocol="generate")).examples) == 4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"protocol": "lm-eval", "split": "test"}, "--split: the protocol lm-eval takes the split"),
        ({"harness_task": "boolq"}, "--harness-task goes with --protocol lm-eval"),
        ({"protocol": "generate", "normalisation": "sum"}, "goes with --protocol choices"),
    ],
)
def test_settings_that_do_not_go_together(setting: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Setting(**setting)  # type: ignore[arg-type]


def test_a_split_without_rows_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without rows is refused where it is read; one of many tasks may have none in it."""
    task = task_with(tmp_path, PREFIX)
    (tmp_path / "test.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match=r"test\.jsonl: has no rows"):
        held_out(task, Setting())
    rows = '{"text": "a", "label": 0, "kind": "other"}\n'
    (tmp_path / "test.jsonl").write_text(rows, encoding="utf-8")
    source = Source(path=str(tmp_path), task_column="kind", task="own")
    with pytest.raises(UsageError, match="own"):
        held_out(replace(task, source=source), Setting())


def test_an_expectation_needs_the_choices_scores(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expectation over its choices.*use --protocol choices"):
        held_out(task_with(tmp_path, NUMBERS), Setting(protocol="generate"))


def test_test_comes_before_validation_and_a_missing_split_is_named(tmp_path: Path) -> None:
    task = task_with(tmp_path, PREFIX, split="validation")
    assert held_out(task, Setting()).split == "validation"
    task_with(tmp_path, PREFIX, split="test")
    assert held_out(task, Setting()).split == "test"
    with pytest.raises(UsageError, match="task 'own': its source has no train split"):
        held_out(task, Setting(split="train"))


def test_an_unknown_task_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown task 'owm'; did you mean 'own'\?"):
        select_tasks([task_with(tmp_path, PREFIX)], "owm")
