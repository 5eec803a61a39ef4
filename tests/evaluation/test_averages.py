"""Averages by hand, and their intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mtl_lora_cli.evaluation.averages import Average, averages
from mtl_lora_cli.evaluation.metrics import Outcome
from mtl_lora_cli.evaluation.resampled import metric


def result(
    task: str, template: str, metrics: list[str], right: float, seed: int = 0
) -> dict[str, Any]:
    """A stored result of 200 examples of two classes."""
    generator = np.random.default_rng([seed, len(task)])
    gold = generator.integers(2, size=200)
    predicted = np.where(generator.random(200) < right, gold, 1 - gold)
    outcome = Outcome(
        gold, predicted, gold_value=gold * 1.0, predicted_value=predicted + 0.1 * gold
    )
    return {
        "task": task,
        "template": {"name": template, "version": 1},
        "metrics": {name: {"value": metric(name, outcome), "why": None} for name in metrics},
        "gold": gold.tolist(),
        "predicted": predicted.tolist(),
        "gold_value": (gold * 1.0).tolist(),
        "predicted_value": (predicted + 0.1 * gold).tolist(),
    }


def by_name(found: list[Average]) -> dict[str, Average]:
    return {one.name: one for one in found}


GLUE = [
    result("cola", "glue/cola", ["matthews", "accuracy"], 0.7),
    result("paraphrases", "glue/mrpc", ["f1", "accuracy"], 0.8),
    result("stsb", "glue/stsb", ["pearson", "spearman"], 0.9),
    result("mnli", "glue/mnli", ["accuracy"], 0.6),
    result("mismatched", "glue/mnli_mismatched", ["accuracy"], 0.5),
    result("own", "own.yaml", ["accuracy"], 0.9),
]


def value(number: int, name: str) -> float:
    found: float = GLUE[number]["metrics"][name]["value"]
    return found


def test_glue_as_its_paper_and_as_papers_on_lora_form_it() -> None:
    found = by_name(averages(GLUE))
    mnli = (value(3, "accuracy") + value(4, "accuracy")) / 2
    several = [
        value(0, "matthews"),
        (value(1, "f1") + value(1, "accuracy")) / 2,
        (value(2, "pearson") + value(2, "spearman")) / 2,
        mnli,
    ]
    assert found["glue"].value == pytest.approx(np.mean(several))
    assert (found["glue"].tasks, found["glue"].of) == (4, 9)
    single = [value(0, "matthews"), value(1, "accuracy"), value(2, "pearson"), mnli]
    assert found["glue (one metric)"].value == pytest.approx(np.mean(single))
    first = [next(iter(one["metrics"].values()))["value"] for one in GLUE]
    assert found["all tasks"].value == pytest.approx(np.mean(first))
    assert found["all tasks"].tasks == 6
    assert "commonsense" not in found


def test_commonsense_in_both_forms() -> None:
    own = [
        result("a", "commonsense/piqa", ["accuracy"], 0.6),
        result("ARC-Easy", "commonsense/llm_adapters", ["accuracy"], 0.9),
        result("c", "commonsense/boolq_no_passage", ["accuracy"], 0.7),
        result("other", "commonsense/copa", ["accuracy"], 0.1),
    ]
    found = by_name(averages(own))["commonsense"]
    assert found.value == pytest.approx(
        np.mean([one["metrics"]["accuracy"]["value"] for one in own[:3]])
    )
    assert (found.tasks, found.of) == (3, 8)


def test_the_interval_is_that_of_a_mean_of_independent_tasks() -> None:
    found = by_name(averages([GLUE[3], GLUE[5]]))["all tasks"]
    shares = [value(3, "accuracy"), value(5, "accuracy")]
    spread = np.sqrt(sum(p * (1 - p) / 200 for p in shares)) / 2
    assert found.low == pytest.approx(np.mean(shares) - 1.96 * spread, abs=0.006)
    assert found.high == pytest.approx(np.mean(shares) + 1.96 * spread, abs=0.006)


def test_another_model_beside_them() -> None:
    worse = [
        result(one["task"], one["template"]["name"], [*one["metrics"]], 0.55, 1) for one in GLUE
    ]
    for one, other in zip(GLUE, worse, strict=True):  # the same rows
        other["gold"], other["gold_value"] = one["gold"], one["gold_value"]
    found = by_name(averages(GLUE, worse))["glue"]
    assert found.value is not None
    assert found.other is not None
    assert found.difference == pytest.approx(found.value - found.other)
    assert found.difference_low is not None
    assert found.difference_high is not None
    assert found.difference_low < found.difference < found.difference_high
    assert found.p is not None
    assert found.p < 0.05
    same = by_name(averages(GLUE, GLUE))["glue"]
    assert (same.difference, same.p) == (0, 1)


def test_a_metric_that_is_undefined_makes_no_average() -> None:
    broken = {**GLUE[0], "metrics": {"matthews": {"value": None, "why": "only one class"}}}
    found = by_name(averages([broken, GLUE[1]]))["glue"]
    assert found.value is None
    assert found.why == "cola: matthews is undefined: only one class"


def test_one_task_has_no_average_and_equal_rules_stand_once() -> None:
    assert averages(GLUE[:1]) == []
    assert [one.name for one in averages(GLUE[3:6])] == ["glue", "all tasks"]
