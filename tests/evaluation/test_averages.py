"""Averages by hand, and their intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mtl_lora_cli.evaluation.averages import Average, averages
from mtl_lora_cli.metrics import Outcome
from mtl_lora_cli.metrics import intervals as metrics
from mtl_lora_cli.metrics.declare import find
from mtl_lora_cli.metrics.intervals import wilson


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The results here come without intervals."""
    monkeypatch.setattr(metrics, "RESAMPLES", 40)


def result(
    task: str, template: str, names: list[str], right: float, seed: int = 0
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
        "metrics": {name: {"value": find(name).value(outcome), "why": None} for name in names},
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


def one_row(task: str, right: bool, metric: str = "accuracy") -> dict[str, Any]:
    """A stored result of a single example of the positive class."""
    gold, predicted = [1], [1 if right else 0]
    value = 1.0 if right else 0.0
    return {
        "task": task,
        "template": {"name": "own.yaml", "version": 1},
        "metrics": {metric: {"value": value, "why": None}},
        "gold": gold,
        "predicted": predicted,
    }


def test_tasks_of_one_row_each_do_not_make_a_sure_average() -> None:
    """By hand: each task's Wilson interval of one of one is 0.2065 to 1."""
    four = [one_row(name, True) for name in "abcd"]
    (found,) = averages(four)
    below = 1 - wilson(1, 1)[0]
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(1 - np.sqrt(4 * (below / 4) ** 2))
    assert found.low < 0.61
    (half,) = averages([one_row(name, name in "ab") for name in "abcd"])
    assert half.low is not None and half.high is not None and half.value == 0.5
    assert half.low < 0.25 and half.high > 0.75
    # Four rows, all of them better: p = 2 / 2⁴, and nothing is known of the next ones.
    (beside,) = averages(four, [one_row(name, False) for name in "abcd"])
    assert (beside.difference, beside.p) == (1.0, 0.125)
    assert beside.difference_low is beside.difference_high is None
    (f1,) = averages([one_row(name, True, "f1") for name in "ab"])
    assert (f1.value, f1.low, f1.high) == (1.0, None, None)


def test_an_average_s_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Tasks of one and of a few rows, drawn again and again: 95 in 100, and little less."""
    generator = np.random.default_rng(0)
    shares, sizes, held = [0.9, 0.6, 0.8, 0.5], [1, 2, 3, 8], 0
    for _ in range(300):
        drawn = []
        for number, (share, size) in enumerate(zip(shares, sizes, strict=True)):
            right = generator.random(size) < share
            own = {"gold": [1] * size, "predicted": right.astype(int).tolist()}
            drawn.append(
                {
                    **one_row(str(number), True),
                    **own,
                    "metrics": {"accuracy": {"value": right.mean()}},
                }
            )
        (found,) = averages(drawn)
        assert found.low is not None and found.high is not None
        held += found.low <= np.mean(shares) <= found.high
    assert held >= 0.93 * 300


def test_a_metric_that_no_result_holds_may_be_undefined_too() -> None:
    """The average asks for F1, which the template did not; no row has the positive class."""
    empty = {
        **one_row("m", True),
        "template": {"name": "glue/mrpc", "version": 1},
        "gold": [0, 0],
        "predicted": [0, 0],
    }
    found = by_name(averages([empty, GLUE[0]]))["glue"]
    assert found.value is None
    assert found.why == "m: f1 is undefined: no row has the positive class, and none is given it"


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
