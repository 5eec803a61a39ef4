"""Each task's metric beside its loss: what `eval` finds on the same rows, and null where nothing is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, matthews_corrcoef

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.evaluate import evaluate
from mtl_lora_cli.evaluation.opened import open_run
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.machine.processes import Processes
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.training import ValidationSettings as Settings
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import Prepared
from mtl_lora_cli.training.run import start
from mtl_lora_cli.training.validation import TaskLook, Validation, encode_validation

FIRST_METRIC = {"sst2": "accuracy", "rte": "accuracy", "cola": "matthews"}
FREE = """\
description: What is the sentence?
prompt: "Repeat:"
answer: "{{ sentence }}"
"""


def observer_of(run: Any) -> Validation:
    (found,) = (one for one in run.trainer._observers if isinstance(one, Validation))
    return found


def test_the_untrained_metrics_are_the_plain_models(
    small: Callable[..., Any], prepared: Prepared, stories_folder: Path
) -> None:
    """Each prompt and choice through transformers alone, scored by scikit-learn."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(stories_folder, attn_implementation="eager").eval()

    def logprob(prompt: list[int], choice: list[int]) -> float:
        tokens = torch.tensor([*prompt, *choice])
        with torch.no_grad():
            logits = plain(tokens[None]).logits[0].log_softmax(-1)
        return sum(float(logits[i - 1, tokens[i]]) for i in range(len(prompt), len(tokens)))

    observer = observer_of(small(validation=Settings(examples=12), row_length=512))
    expected = {}
    for one in observer._asked:
        assert one.examples is not None
        gold = [example.gold for example in one.examples.examples]
        predicted = [
            int(np.argmax([logprob(asked.prompt, choice) for choice in asked.choices]))
            for asked in one.requests
        ]
        by = accuracy_score if one.metric == "accuracy" else matthews_corrcoef
        expected[one.task.name] = float(by(gold, predicted))
    assert {one.task.name: one.metric for one in observer._asked} == FIRST_METRIC
    values = {name: one.value for name, one in observer.metrics().items()}
    assert values == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
def test_the_last_look_is_what_eval_finds(recipe_file: Path, tmp_path: Path) -> None:
    """All rows of the split, so that both see the same ones."""
    overrides = ["training.validation.every=4", "training.row_length=512", "training.max_steps=5"]
    run = start(prepare(load_recipe(recipe_file, overrides)), tmp_path / "run")
    looks = [event for event in run.events() if event["event"] == "validation"]
    assert [look["step"] for look in looks] == [4, 5]
    opened = open_run(run)
    tasks = [task for task in opened.tasks if task.name in FIRST_METRIC]
    found = {
        one["task"]: one["metrics"][FIRST_METRIC[one["task"]]]["value"]
        for one in evaluate(opened, tasks, Setting(split="validation"))
    }
    assert looks[-1]["metric"] == pytest.approx(found, abs=1e-12)
    assert looks[-1]["metric_name"] == FIRST_METRIC
    for look in looks:
        assert look["macro"]["loss"] == pytest.approx(fmean(look["loss"].values()))
        assert look["macro"]["metric"] == pytest.approx(fmean(look["metric"].values()))


def test_without_metric_only_losses_are_written(small: Callable[..., Any]) -> None:
    seen = observer_of(small(validation=Settings(examples=4, metric=False))).look(1)
    assert set(seen.event) == {"event", "step", "loss", "examples", "macro"}
    assert set(seen.event["macro"]) == {"loss"}
    assert seen.line is not None
    assert "accuracy" not in seen.line


def test_a_metric_that_the_examples_leave_undefined_is_null(small: Callable[..., Any]) -> None:
    """One example has one class: no correlation is defined, whatever is answered."""
    seen = observer_of(small(validation=Settings(examples=1, best="cola"))).look(1)
    assert seen.event["metric"]["cola"] is None
    assert set(seen.event["metric_name"]) == {"sst2", "rte"}
    both = [seen.event["metric"][name] for name in ("sst2", "rte")]
    assert seen.event["macro"]["metric"] == fmean(both)
    assert seen.mark is not None
    assert (seen.mark.value, seen.mark.higher) == (seen.event["loss"]["cola"], False)
    json.dumps(seen.event, allow_nan=False)


def test_free_answers_have_a_loss_and_no_metric(
    prepared: Prepared, small_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "free.yaml").write_text(FREE)
    (tmp_path / "recipe.yaml").write_text(
        f"base_model: {prepared.recipe.base_model}\n"
        f"tasks: [{{name: free, template: free.yaml, source: {small_data / 'sst2'}}}]\n"
        "training: {validation: {examples: 3, best: free}, max_steps: 1}\n"
    )
    found = prepare(load_recipe(tmp_path / "recipe.yaml"))
    (held,) = found.validation or []
    assert (held.metric, len(held.split)) == (None, 3)
    packed, adapter = found.build()
    (observer,) = found.observers(packed, adapter)
    seen = observer.look(1)
    assert seen is not None
    assert seen.event["metric"] == {"free": None}
    assert seen.event["macro"] == {"loss": seen.event["loss"]["free"], "metric": None}
    assert seen.mark is not None
    assert seen.mark.of == "free loss on 3 held-out examples"


def test_a_prompt_too_long_is_cut_to_a_row(prepared: Prepared) -> None:
    settings = prepared.recipe.training.model_copy(update={"validation": Settings(examples=40)})
    recipe = prepared.recipe.model_copy(update={"training": settings})
    held = encode_validation(prepared.data.tasks, recipe, prepared.tokenizer, 512)
    requests = [request for one in held for request in one.requests]
    assert any(request.truncated for request in requests)
    for request in requests:
        assert len(request.prompt) + max(map(len, request.choices)) <= 128


def test_what_the_first_process_finds_holds_for_all(small: Callable[..., Any]) -> None:
    """Two processes may differ by rounding, and would then keep different checkpoints."""

    class OfOthers(Processes):
        def same(self, value: Any) -> Any:
            losses, values = value
            told = {name: TaskLook(0.25) for name in values}
            return {name: loss + 1 for name, loss in losses.items()}, told

    observer = observer_of(small(validation=Settings(examples=4, best="macro")))
    own = observer.look(1).event
    observer._processes = OfOthers()
    seen = observer.look(1)
    assert seen.event["loss"] == {name: loss + 1 for name, loss in own["loss"].items()}
    assert seen.mark is not None
    assert seen.mark.value == 0.25


@pytest.mark.parametrize(
    ("best", "error"),
    [
        (
            "ste2",
            "unknown task 'ste2'; did you mean 'sst2'?; known: macro, sst2, rte, cola, home_depot",
        ),
        ("home_depot", "task 'home_depot': its source has no validation split"),
    ],
)
def test_the_best_of_what_is_not_looked_at_is_an_error(
    recipe_file: Path, best: str, error: str
) -> None:
    with pytest.raises(UsageError) as caught:
        prepare(load_recipe(recipe_file, [f"training.validation.best={best}"]))
    assert caught.value.lines == [f"command line: training.validation.best: {error}"]


def test_patience_without_best_is_an_error(recipe_file: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe_file, ["training.validation.patience=2"])
    (line,) = caught.value.lines
    assert line.endswith(
        "training.validation: 'patience' needs 'best': macro, or the name of a task"
    )


def test_the_mark_names_what_it_is(small: Callable[..., Any]) -> None:
    observer = observer_of(small(validation=Settings(examples=4)))
    assert observer.look(1).mark is None
    said = {}
    for best in ("macro", "cola", "sst2"):
        observer._settings = replace_best(observer._settings, best)
        mark = observer.look(1).mark
        assert mark is not None
        said[best] = mark.of
    assert said == {
        "macro": "macro metric on 12 held-out examples",
        "cola": "cola matthews on 4 held-out examples",
        "sst2": "sst2 accuracy on 4 held-out examples",
    }


def replace_best(settings: Settings, best: str) -> Settings:
    return settings.model_copy(update={"best": best})
