"""The self-test in a run of two processes: before weights are cut, in each process, with the same end.

A tiny Mamba is the witness: its state would run on from one example of a packed row into the next, so
whoever did not test it would learn something else than a model that was asked example by example.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..families.build import build
from ..families.models import tiny
from ..forks import Forks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    build(tiny("mamba"), folder / "mamba")
    recipe = {
        "base_model": "mamba",
        "adapter": {"rank": 4, "target_modules": ["in_proj"]},
        "tasks": [{"name": name, "template": f"samples/{name}"} for name in ("animals", "uses")],
        "training": {"max_steps": 3, "learning_rate": 1e-2, "row_length": 128, "rows_per_step": 4},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


@pytest.fixture
def forks(tmp_path: Path) -> Iterator[Forks]:
    """With a cache of their own: nobody has tested this model before."""
    environment = {**os.environ, "MTL_LORA_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    started = Forks("torch", "transformers", environment=environment)
    yield started
    started.close()


def steps(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "step"]


@pytest.mark.long  # tests/models has the self-test in one process, test_distributed.py two processes that learn
def test_two_processes_test_what_one_tests(place: Path, forks: Forks) -> None:
    for name, more in (("two", ("--num-processes", "2")), ("one", ())):
        ended = forks.run("train", "recipe.yaml", f"run.name={name}", *more, cwd=place)
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr.count("note: plain engine, one example a row") == 1
    one, two = (place / "runs" / name for name in ("one", "two"))
    for run in (one, two):
        engine = json.loads((run / "environment.json").read_text())["engine"]
        assert engine["layout"] == "rows" and "beside each alone" in engine["self_test"]
    for alone, shared in zip(steps(one), steps(two), strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_weights_that_cannot_be_gathered_together_are_not_cut(place: Path, forks: Forks) -> None:
    """The self-test has found rows by then; cut weights would wait for calls that never come."""
    call = (
        "train",
        "recipe.yaml",
        "run.name=cut",
        "distributed.zero_stage=3",
        "--num-processes",
        "2",
    )
    ended = forks.run(*call, cwd=place)
    assert ended.returncode == 2, ended.stderr
    (line,) = [one for one in ended.stderr.splitlines() if one.startswith("error")]
    assert "zero_stage: 3 cannot cut this model: it wants packed rows" in line
    assert "one example a row" in line and line.endswith("use stage 2")
    assert not (place / "runs" / "cut").exists()
