"""Rows without labels: the answers of the evaluation, whatever they are mixed with."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.evaluation import glue_submission
from mtl_lora_cli.evaluation.answers import answer
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.predict import NEW_TOKENS, Predictor
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.tasks.template import read_template

LABELS = ("label", "answer", "output", "score")  # no row to predict has one
FILES = {
    "sst2": "glue/sst2/validation",
    "home_depot": "ads/home_depot/test",
    "llm_adapters": "commonsense/openbookqa/test",
    "stsb": "glue/stsb/validation",
}


@pytest.fixture
def rows(data_folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows that `held` was rendered from, without what is to be predicted."""
    found = {}
    for name, file in FILES.items():
        with gzip.open(data_folder / f"{file}.jsonl.gz", "rt", encoding="utf-8") as lines:
            read = [json.loads(line) for line in itertools.islice(lines, 6)]
        found[name] = [{k: v for k, v in row.items() if k not in LABELS} for row in read]
    return found


def test_predictions_are_those_of_the_evaluation(
    opened: Run, tasks: list[Task], held: list[Examples], rows: dict[str, list[dict[str, Any]]]
) -> None:
    predictor = Predictor(opened)
    for task, examples, said in zip(
        tasks, held, answer(opened, tasks, held, Setting()), strict=True
    ):
        found = predictor.predict(rows[task.name], task=task.name)
        assert len(found) == len(examples.examples)
        for number, (one, example) in enumerate(zip(found, examples.examples, strict=True)):
            assert one["task"] == task.name
            assert one["answer"] == example.choices[said.outcome.predicted[number]]
            assert tuple(one["probabilities"]) == example.choices
            assert sum(one["probabilities"].values()) == pytest.approx(1)
            assert one["probabilities"][one["answer"]] == max(one["probabilities"].values())
            labels = task.template.labels
            if labels is not None:
                assert one["label"] == labels[said.outcome.predicted[number]]
        if said.outcome.predicted_value is not None:
            assert [one["value"] for one in found] == pytest.approx(said.outcome.predicted_value)


def test_mixed_tasks_are_answered_as_each_alone(
    opened: Run, rows: dict[str, list[dict[str, Any]]]
) -> None:
    predictor = Predictor(opened)
    alone = {name: predictor.predict(own, task=name) for name, own in rows.items()}
    mixed = [{**rows[name][n], "which": name} for n in range(6) for name in reversed(FILES)]
    found = predictor.predict(iter(mixed), task_column="which")
    expected = [alone[name][n] for n in range(6) for name in reversed(FILES)]
    for one, other in zip(found, expected, strict=True):
        assert (one["task"], one["label"]) == (other["task"], other["label"])
        assert list(one["probabilities"].values()) == pytest.approx(
            list(other["probabilities"].values()), abs=1e-5
        )


def test_a_free_answer_is_generated(opened: Run, tasks: list[Task], tmp_path: Path) -> None:
    path = tmp_path / "free.yaml"
    path.write_text('description: Free.\nprompt: "{{ q }}"\nanswer: "{{ a }}"\n', encoding="utf-8")
    free = dataclasses.replace(tasks[0], template_name="free", template=read_template(path))
    predictor = Predictor(opened.but(tasks=[free]))
    (found,) = predictor.predict([{"q": "Once upon a time"}])  # the only task need not be named
    assert found["task"] == "sst2"
    assert set(found) == {"task", "answer"}
    length = len(opened.tokenizer(found["answer"], add_special_tokens=False)["input_ids"])
    assert 1 < length <= NEW_TOKENS + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "sst"}, "unknown task 'sst'; did you mean 'sst2'?; tasks of this run: sst2"),
        ({}, "give --task or --task-column: which task are the rows of?"),
        ({"task": "sst2", "task_column": "t"}, "not both"),
        ({"task_column": "tsk"}, "row 1: has no field 'tsk'; did you mean 'task'?"),
        ({"task_column": "task"}, "row 1: task: unknown task 'no'"),
        ({"task": "home_depot"}, "row 1: task 'home_depot': prompt: the row has no field"),
    ],
)
def test_what_cannot_be_answered(opened: Run, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Predictor(opened).predict([{"sentence": "fine", "task": "no"}], **arguments)


def test_no_rows_have_no_predictions(opened: Run) -> None:
    assert Predictor(opened).predict([], task="sst2") == []


@pytest.mark.parametrize(
    ("template", "row", "prediction", "expected"),
    [
        ("glue/sst2", {"idx": 7}, {"label": 1}, "7\t1"),
        ("glue/rte", {}, {"label": "not_entailment"}, "3\tnot_entailment"),
        ("glue/mnli", {"index": 9}, {"label": "neutral"}, "9\tneutral"),
        ("glue/stsb", {}, {"label": 2.5, "value": 2.71828}, "3\t2.718"),
    ],
)
def test_glue_s_lines(
    tasks: list[Task], template: str, row: dict[str, int], prediction: dict[str, Any], expected: str
) -> None:
    name = glue_submission.require_glue(dataclasses.replace(tasks[0], template_name=template))
    assert glue_submission.line(name, 3, row, prediction) == expected


def test_only_glue_s_tasks_have_its_form(tasks: list[Task]) -> None:
    with pytest.raises(UsageError, match="expected one of glue/cola"):
        glue_submission.require_glue(dataclasses.replace(tasks[0], template_name="ads/esci"))
    with pytest.raises(UsageError, match="no label '5'"):
        glue_submission.line("sst2", 0, {}, {"label": np.int64(5)})


@pytest.mark.parametrize("protocol", ["choices", "generate"])
def test_no_number_is_no_answer(
    opened: Run,
    tasks: list[Task],
    held: list[Examples],
    rows: dict[str, list[dict[str, Any]]],
    protocol: str,
) -> None:
    """Sums beyond the dtype, as long rows have them in float16: nothing is the likeliest of NaN."""
    adapter = opened.packed.adapter
    assert adapter is not None
    tensors = adapter.tensors()
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    said = "row 1: .* finds no finite log-probability for an answer to this row .6 of 6 rows"
    if protocol == "generate":
        said = "finds no finite logits behind [1-6] of [1-6] prompts"
    try:
        for tensor in tensors.values():
            tensor.data.mul_(1e30)
        with pytest.raises(MtlLoraError, match=said.replace("row 1", f"{tasks[0].name}:0")):
            answer(opened, tasks[:1], held[:1], Setting(protocol=protocol))
        if protocol == "choices":
            with pytest.raises(MtlLoraError, match=said):
                Predictor(opened).predict(rows["sst2"], task="sst2")
    finally:
        for name, tensor in tensors.items():
            tensor.data.copy_(before[name])
