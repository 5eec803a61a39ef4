"""Results that were stored when scikit-learn and scipy gave the values are made again from their rows.

before.json: what `eval` of commit 24b8831 kept of three tasks, the base model and an adapter on 60 rows each,
and what it said of the two.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.evaluation.averages import averages
from mtl_lora_cli.evaluation.results import outcome_in
from mtl_lora_cli.metrics.intervals import measure
from mtl_lora_cli.metrics.paired import paired

BEFORE = json.loads((Path(__file__).parent / "before.json").read_text(encoding="utf-8"))
RESULTS = {(one["task"], one["model"]): one for one in BEFORE["results"]}


def same(ours: dict[str, Any], stored: dict[str, Any]) -> None:
    assert set(ours) == set(stored)
    for key, value in stored.items():
        assert ours[key] == (pytest.approx(value, abs=1e-12) if type(value) is float else value)


@pytest.mark.parametrize("which", RESULTS, ids="-".join)
def test_values_and_intervals(which: tuple[str, str]) -> None:
    result = RESULTS[which]
    for name, stored in result["metrics"].items():
        same(dataclasses.asdict(measure(name, outcome_in(result))), stored)


@pytest.mark.parametrize("task", BEFORE["paired"])
def test_differences_and_their_tests(task: str) -> None:
    ours, theirs = (outcome_in(RESULTS[task, model]) for model in ("adapter", "base"))
    for name, stored in BEFORE["paired"][task].items():
        same(dataclasses.asdict(paired(name, ours, theirs, task)), stored)


def test_the_average() -> None:
    ours, theirs = (
        [{**RESULTS[task, model], "template": None} for task in BEFORE["paired"]]
        for model in ("adapter", "base")
    )
    (found,) = averages(ours, theirs)
    (stored,) = BEFORE["averages"]
    same(dataclasses.asdict(found), stored)
