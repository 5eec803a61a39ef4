"""Every method learns on real rows, is saved, evaluated, and merged where it can be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mtl_lora_cli.adapters.methods import METHODS
from mtl_lora_cli.cli.app import app

from ..often import often

pytestmark = pytest.mark.slow


def cli(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    "method",
    often(
        [name for name in METHODS if name != "mtl-lora"],
        ("lora", "dora", "mtlora", "mtl-lora-fine"),
    ),
)
def test_trains_evaluates_and_merges(method: str, recipe_file: Path, tmp_path: Path) -> None:
    runs = f"run.directory={tmp_path}"
    trained = cli(
        "train", str(recipe_file), f"adapter.method={method}", "adapter.rank=8", runs,
        "training.max_steps=4", "run.name=one",
        *(["adapter.dropout=0"] if method == "pissa" else []),
    )  # fmt: skip
    assert trained.exit_code == 0, trained.stderr
    run = str(tmp_path / "one")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "one/metrics.jsonl").open()]
    assert losses[-1] < losses[0]
    scored = cli("eval", "--run", run, "--task", "rte", "--limit", "8", "--json")
    assert scored.exit_code == 0, scored.stderr
    merged = cli(
        "merge", "--run", run, "--task", "rte", "--output", str(tmp_path / "merged"), "--json"
    )
    if METHODS[method].mergeable() or METHODS[method].scales_rows:
        assert merged.exit_code == 0, merged.stderr
    else:
        assert merged.exit_code == 2
        assert "mixes its up-projections by the token" in merged.stderr
        assert not (tmp_path / "merged").exists()
