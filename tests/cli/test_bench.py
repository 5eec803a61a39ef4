"""`mtl-lora bench`: numbers that agree with each other, and one line for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Finished = subprocess.CompletedProcess[str]

TINY = ("bench", "--shape", "tiny", "--row-length", "512", "--steps", "2", "--warmup", "1")


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from mtl_lora_cli.cli.main import app\n"
        "try:\n    app(['bench', '--help'])\n"
        "except SystemExit: pass\n"
        "print('HEAVY', *[n for n in ('torch', 'numpy', 'transformers') if n in sys.modules])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "Example: mtl-lora bench " in finished.stdout
    assert finished.stdout.splitlines()[-1].split() == ["HEAVY"]


def test_json(invoke: Callable[..., Finished]) -> None:
    finished = invoke(*TINY, "--vs", "plain", "--json")
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["format_version"] == 1
    assert report["environment"]["versions"]["torch"]
    mine, plain = report["cases"]
    assert (mine["baseline"], plain["baseline"]) == (None, "plain")
    assert mine["tokens"] == plain["tokens"], "both train on the same rows"
    for case in (mine, plain):
        rates = [n / s for n, s in zip(case["tokens"], case["seconds"], strict=True)]
        assert case["tokens_per_second"] == pytest.approx(sum(rates) / 2)  # the median of two
        assert case["tokens_per_second_min"] == pytest.approx(min(rates))
        floor = case["floor"]
        rate = report["rate"]["measured_flop_per_second"]
        assert floor["tokens_per_second"] == pytest.approx(rate / floor["flop_per_token"])
        share = case["tokens_per_second"] / floor["tokens_per_second"]
        assert case["share_of_floor"] == pytest.approx(share)
        assert case["loss"] == case["losses"][-1]
    (ratio,) = report["ratios"]
    expected = mine["tokens_per_second"] / plain["tokens_per_second"]
    assert ratio["tokens_per_second"] == pytest.approx(expected)
    assert (ratio["case"], ratio["baseline_name"]) == (mine["name"], plain["name"])


def test_table(invoke: Callable[..., Finished], tmp_path: Path) -> None:
    finished = invoke(*TINY, "--breakdown")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("case")
    for part in (
        "tiny mtl-lora  ",
        "floor of tiny: ",
        "matrix products (base)",
        "idle",
        "launches",
    ):
        assert part in finished.stdout
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_a_recipe_gives_the_adapter(
    invoke: Callable[..., Finished], small_recipe: Callable[[], Path]
) -> None:
    finished = invoke("bench", "--recipe", str(small_recipe()), *TINY[3:], "--json")
    assert finished.returncode == 0, finished.stderr
    (case,) = json.loads(finished.stdout)["cases"]
    assert (case["tasks"], case["rows_per_step"], case["row_length"]) == (2, 2, 512)
    assert (case["adapter"]["gate"], case["adapter"]["dropout"]) == ("embedding", 0.1)
    assert case["adapter"]["alpha"] == 16


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--shape", "tny"], "--shape: 'tny' is neither a known shape nor a folder; did you mean"),
        (["--shape", "tiny", "--row-length", "468"], "--row-length: the longest example has 469"),
        (["--vs", "pefft"], "--vs: expected one of peft, plain, lora, received 'pefft'"),
        (["--case", "yard"], "--case: expected one of yardstick, received 'yard'"),
        (
            ["--method", "dora"],
            "--method: expected one of mtl-lora, lora, mtlora, moelora, multilora, hydralora, received 'dora'",
        ),
        (["--quantization", "int8"], "--quantization: expected one of none, nf4"),
        (["--modules", ","], "--modules: expected qkvo, all, or names of layers"),
        (["--shape", "tiny", "--modules", "q_prj"], "adapter.target_modules: 'q_prj' matches no"),
        (["--engine", "plain", "--vs", "plain"], "--vs plain: the case itself runs on the plain"),
        (["--method", "lora", "--up-projections", "3"], "--up-projections: plain LoRA has one"),
        (["--recipe", "quickstrt"], "quickstrt: no such recipe file; did you mean 'quickstart'?"),
        (["--shape", "tiny", "--base-compute", "fp8"], "--base-compute fp8 needs a CUDA card"),
    ],
)
def test_bad_input(
    invoke: Callable[..., Finished],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    error: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    finished = invoke("bench", *arguments)
    assert finished.returncode == 2
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert line.startswith(f"error: {error}")


def test_a_case_that_does_not_fit_is_one_line(
    invoke: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mtl_lora_cli.comparison.measure.run_case", full)
    finished = invoke(*TINY)
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr == "error: tiny mtl-lora: does not fit\n"
