"""The plan of the next study is what its page says, and its arms are of equal size."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.adapters.methods.base import Settings

from .pages import imported

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
# SmolLM2-135M: module → (out, in), in each of 30 layers.
SHAPES = {
    "q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576),
    "gate_proj": (1536, 576), "up_proj": (1536, 576), "down_proj": (576, 1536),
}  # fmt: skip


def benchmark(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(
        name, ROOT / "tests" / "benchmarks" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plan() -> Any:
    return benchmark("next_study")


def config(arm: Any) -> Settings:
    own = {
        k.removeprefix("adapter."): v for k, v in arm.settings.items() if k.startswith("adapter.")
    }
    return configure(arm.method, target_modules=list(SHAPES), **own)


def test_arms_are_of_equal_size_and_lora_is_matched_from_above(plan: Any) -> None:
    shapes = {f"layers.{n}.{name}": shape for n in range(30) for name, shape in SHAPES.items()}
    sizes = {name: config(arm).count(shapes, tasks=17) for name, arm in plan.ARMS.items()}
    assert sizes["A"] == 5_011_200
    assert sizes["B"] == 4_945_170  # as the study's winner
    for name, size in sizes.items():
        if name != "F":
            assert 4_940_000 <= size <= sizes["A"], name
    assert sizes["F"] == pytest.approx(sizes["A"], rel=0.03)


def test_the_page_has_the_plans_numbers(plan: Any) -> None:
    counts = {
        "0": len(plan.controls()) * 2 * len(plan.SEEDS["0"]),
        "1": len(plan.SEARCHED) * len(plan.draws()) * len(plan.SEEDS["1"]),
        "2": 5 * len(plan.SEEDS["2"]),
        "3": 3 * 2 * len(plan.SEEDS["3"]),
        "4": 3 * 3 * len(plan.SEEDS["4"]),
    }
    assert counts == plan.RUNS
    told = dict(re.findall(r"^\| (\d) \| .* \| (\d+) \|$", PAGE, re.MULTILINE))
    assert {stage: int(count) for stage, count in told.items()} == counts
    assert f"of {sum(counts.values())} runs are in" in PAGE
    seeds = [seed for own in list(plan.SEEDS.values())[2:] for seed in own]
    assert len(set(seeds)) == len(seeds), "no seed is used in two stages that report"


def test_an_arm_takes_the_rates_of_its_own_parts(plan: Any) -> None:
    drawn = {"rate": 1e-3, "up": 4, "transform": 10, "gate": 3, "embedding": 1}
    assert plan.rates(plan.ARMS["A"], drawn, 2) == {
        "training.learning_rate": 2e-3,
        "training.parts.up.learning_rate": 8e-3,
    }
    assert len(plan.rates(plan.ARMS["E"], drawn)) == 5
    assert plan.draws() == plan.draws()


def test_a_later_stage_waits_for_the_one_before(plan: Any, tmp_path: Path) -> None:
    with pytest.raises(plan.UsageError, match="stage 0 has 0 of 12 runs; finish it first"):
        plan.chosen_control(tmp_path)
    assert plan.status(tmp_path) == dict.fromkeys("01234", 0)


def test_the_tables_of_who_tunes_nothing_are_made_of_its_result_files() -> None:
    untuned = benchmark("untuned")
    runs = ROOT / "docs" / "study" / "untuned"
    lines = list(untuned.report(runs, untuned.mixtures("5")))
    assert len(lines) == 2 + 5 * 4
    assert "\n".join(lines) in PAGE
    lines = list(untuned.others(runs / "others", untuned.mixtures("3,4,5,6", 20261201)))
    assert len(lines) == 2 + 4
    assert "\n".join(lines) in PAGE


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs that are in, as the queue left them."""
    folder = tmp_path_factory.mktemp("next")
    answers = imported("study/answers")
    for stage in answers.NEXT:
        if (answers.STUDY / stage).is_dir():
            answers.unpack(stage, folder)
            text = answers.hashes(answers.files(stage))
            assert text == (answers.STUDY / stage / answers.HASHES).read_text(encoding="utf-8")
    return folder / "next"


def test_the_page_says_how_many_runs_are_in_and_of_which_commit(plan: Any, kept: Path) -> None:
    count = sum(plan.status(kept).values()) if kept.is_dir() else 0
    assert f"**{count} of {sum(plan.RUNS.values())} runs are in.**" in PAGE
    (commit,) = re.findall(r"^git worktree add .* ([0-9a-f]{40})$", PAGE, re.MULTILINE)
    for stage in plan.status(kept):
        for name, result in plan.results(kept / stage).items():
            assert result["environment"]["git_revision"] == commit, name


def test_the_tables_of_the_stages_are_made_of_their_runs(plan: Any, kept: Path) -> None:
    controls, searched = "\n".join(plan.report(kept)).split("\n\n")
    for stage, table in (("0", controls), ("1", searched)):
        if plan.results(kept / stage):
            assert table in PAGE
