"""A recipe's own choice of metrics for a task."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.tasks.registry import find_template, template_names
from mtl_lora_cli.tasks.task import Task, measured_by


@pytest.mark.parametrize("name", template_names())
def test_nothing_but_the_metrics_changes(name: str) -> None:
    _, _, template = find_template(name, None)
    assert measured_by(template, None) is template
    again = measured_by(template, list(reversed(template.metrics)))
    assert list(again.metrics) == list(reversed(template.metrics))
    assert again.model_copy(update={"metrics": template.metrics}) == template


def test_what_does_not_fit_is_refused() -> None:
    _, _, template = find_template("instruct/messages", None)
    with pytest.raises(ValueError, match=r"'accuracy' does not fit; possible here: .*rouge_l"):
        measured_by(template, ["accuracy"])
    with pytest.raises(ValueError, match="did you mean 'rouge_l'"):
        measured_by(template, ["rouge_k"])


def test_a_run_folder_keeps_them() -> None:
    name, path, template = find_template("instruct/messages", None)
    metrics = ("bleu", "exact_match")
    task = Task(
        "t", 0, name, path.read_text(), measured_by(template, metrics), Source(path="x"),
        "conversation", metrics=metrics,
    )  # fmt: skip
    again = Task.from_json(json.loads(json.dumps(task.to_json())))
    assert again == task and list(again.template.metrics) == list(metrics)
    plain = dataclasses.replace(task, metrics=None, template=template)
    assert "metrics_of_recipe" not in plain.to_json()
    assert Task.from_json(plain.to_json()).template.metrics == template.metrics
