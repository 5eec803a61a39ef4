"""`compare` at the command line: its plan, its report, and what is wrong with a call."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Finished = subprocess.CompletedProcess[str]
Invoke = Callable[..., Finished]


@pytest.fixture
def recipe(small_recipe: Callable[[], Path]) -> str:
    return str(small_recipe())


CALL = ("--seeds", "1", "--output", "out", "--match", "params:27392", "training.max_steps=2")


def test_a_dry_run_prints_ranks_and_writes_nothing(
    recipe: str, invoke: Invoke, tmp_path: Path
) -> None:
    finished = invoke("compare", recipe, *CALL, "--dry-run", "--json")
    assert finished.returncode == 0, finished.stderr
    plan = json.loads(finished.stdout)
    assert [run["id"] for run in plan["runs"]] == ["lora-seed0", "mtl-lora-seed0"]
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_the_budget(recipe: str, invoke: Invoke) -> None:
    finished = invoke("compare", recipe, *CALL, "--dry-run", "--sweep", "adapter.temperature=0.1,1")
    assert "tuning: 2 settings for each method, on 1 seed: 2 runs each" in finished.stdout
    assert "lora does not read every swept key" in finished.stdout


@pytest.mark.slow
def test_a_report_is_made_again_without_a_model(
    recipe: str, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = invoke("compare", recipe, *CALL, "--json")
    assert finished.returncode == 0, finished.stderr
    before = json.loads(finished.stdout)
    monkeypatch.setattr("mtl_lora_cli.models.load.load_model", None)
    again = invoke("compare", "--report-only", "--output", "out", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["average"] == before["average"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--methods", "lora,mtlra"], "--methods: unknown method 'mtlra'; did you mean 'mtlora'?"),
        (["--sweep", "adapter.ranck=1,2"], "--sweep: 'adapter.ranck': unknown key; did you mean"),
        (["--seeds", "1,1"], "--seeds: '1' stands twice"),
        (["--baseline", "mtlora"], "--baseline: expected one of lora, mtl-lora"),
        (["--match", "rank"], "--match: expected params, params:N or none, received 'rank'"),
        (["--score", "validatoin"], "--score: expected test or validation, received 'validatoin'"),
        (["--match", "params:50"], "--match: lora cannot come within 2% of 50"),
        (["--report-only", "--output", "nowhere"], "nowhere holds no comparison"),
    ],
)
def test_a_wrong_call_is_one_line_and_code_2(
    recipe: str, invoke: Invoke, arguments: list[str], error: str, tmp_path: Path
) -> None:
    finished = invoke("compare", recipe, *arguments)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith(f"error: {error}")
    assert list(tmp_path.iterdir()) == []
