"""Rows as the commands read and show them: small files that once were learned wrongly in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Finished = Any

REVIEW = """\
description: Is a review good?
prompt: |
  Review: {{ sentence }}
  Good (no or yes):
label: label
choices: {0: no, 1: yes}
"""
RECIPE = """\
base_model: BASE
adapter: {method: mtl-lora, rank: 4, alpha: 8, target_modules: [q_proj, v_proj]}
tasks:
  - {name: a, template: task.yaml, source: rows}
training: {max_steps: 4, row_length: 256, rows_per_step: 1}
"""
TRAIN = (
    '{"sentence": "a fine film", "label": 1}\n{"sentence": "dull from end to end", "label": 0}\n'
)


@pytest.fixture
def lay_out(tmp_path: Path, stories_folder: Path) -> Callable[..., None]:
    """`lay_out(rows={"train.csv": text}, template=…)`: a recipe of one task in the working directory."""

    def write(rows: dict[str, str], template: str = REVIEW) -> None:
        base = str(stories_folder.resolve())
        (tmp_path / "recipe.yaml").write_text(RECIPE.replace("BASE", base), encoding="utf-8")
        (tmp_path / "task.yaml").write_text(template, encoding="utf-8")
        (tmp_path / "rows").mkdir()
        for name, text in rows.items():
            (tmp_path / "rows" / name).write_text(text, encoding="utf-8")

    return write


def test_a_tsv_s_quotation_marks_are_text(
    lay_out: Callable[..., None], invoke: Callable[..., Finished]
) -> None:
    text = 'sentence\tlabel\n"It begins like a dream\t1\nThe plot is thin\t0\nIt ends so"\t0\n'
    lay_out({"train.tsv": text})
    finished = invoke("tasks", "show", "task.yaml", "--source", "rows", "--count", "9")
    assert finished.returncode == 0
    shown = [line for line in finished.stdout.splitlines() if line.startswith("Review: ")]
    assert shown == [
        'Review: "It begins like a dream',
        "Review: The plot is thin",
        'Review: It ends so"',
    ]
    assert finished.stderr == ""


def test_a_source_in_braces_and_a_note(
    lay_out: Callable[..., None], invoke: Callable[..., Finished]
) -> None:
    lay_out({"all.txt": '0|"A ""must see"""\n'})
    keys = "path: rows/all.txt, delimiter: '|', columns: [label, sentence]"
    for quoting, text in (("none", '"A ""must see"""'), ("csv", 'A "must see"')):
        source = f"{{{keys}, quoting: {quoting}}}"
        finished = invoke("tasks", "show", "task.yaml", "--source", source)
        assert f"Review: {text}\n" in finished.stdout
    text = 'sentence\tlabel\n"A ""must see"""\t1\n'
    Path("rows/train.tsv").write_text(text, encoding="utf-8")
    noted = invoke("tasks", "show", "task.yaml", "--source", "rows/train.tsv")
    assert (
        "rows/train.tsv: fields that look quoted as in CSV, read as they stand: 1, " in noted.stderr
    )


def test_a_gap_in_a_prompt_is_a_note(
    lay_out: Callable[..., None], invoke: Callable[..., Finished], tmp_path: Path
) -> None:
    lay_out({"train.csv": 'sentence,label\ngood,1\n,0\n"   ",1\n'})
    finished = invoke("validate", "recipe.yaml")
    assert finished.returncode == 0
    assert (
        "note: a: 2 of 3 training rows have an empty or blank field in their prompt (sentence), the "
        f"first is {tmp_path}/rows/train.csv:3\n"
    ) in finished.stdout


def test_validation_rows_that_are_learned_are_a_note(
    lay_out: Callable[..., None], invoke: Callable[..., Finished]
) -> None:
    test = '{"sentence": "new", "label": 1}\n'
    lay_out({"train.jsonl": TRAIN, "validation.jsonl": TRAIN, "test.jsonl": test})
    finished = invoke("validate", "recipe.yaml")
    assert "note: a: 2 of 2 validation rows also stand in train\n" in finished.stdout


def test_a_field_with_the_name_of_a_method(
    lay_out: Callable[..., None], invoke: Callable[..., Finished]
) -> None:
    template = 'description: d\nprompt: "{{ basket.items }}"\nanswer: "{{ answer }}"\n'
    row = '{"basket": {"items": "three pears", "values": 3}, "answer": "ok"}\n'
    lay_out({"train.jsonl": row}, template)
    finished = invoke("tasks", "show", "task.yaml", "--source", "rows")
    assert finished.stdout.splitlines()[1:] == ["three pears [ok]"]


def test_the_way_out_of_a_split_without_labels_leads_on(
    lay_out: Callable[..., None], invoke: Callable[..., Finished]
) -> None:
    test = '{"sentence": "so so", "label": -1}\n'
    lay_out({"train.jsonl": TRAIN, "validation.jsonl": TRAIN, "test.jsonl": test})
    refused = invoke("validate", "recipe.yaml")
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "label: received -1, expected one of 0, 1; no test row has a right answer" in line
    source = line.partition("leave the split out with source: ")[2]
    assert invoke("validate", "recipe.yaml", f"tasks.a.source={source}").returncode == 0
