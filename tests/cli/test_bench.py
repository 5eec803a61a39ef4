"""`mtl-lora bench`: numbers that agree with each other, and one line for each mistake."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

Finished = subprocess.CompletedProcess[str]

TINY = ("bench", "--shape", "tiny", "--row-length", "512", "--steps", "2", "--warmup", "1")


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


@pytest.mark.parametrize(("recipe", "tasks"), [("commonsense", 8), ("glue-llama3-8b", 9)])
def test_a_recipe_whose_model_is_not_here_is_measured_by_shape(
    invoke: Callable[..., Finished], recipe: str, tasks: int
) -> None:
    """Adapter, quantization and rows are the recipe's; `memory: auto` is picked as training does."""
    pytest.importorskip("bitsandbytes")
    finished = invoke("bench", "--recipe", recipe, *TINY[1:], "--vs", "lora", "--json")
    assert finished.returncode == 0, finished.stderr
    assert "Failed to load" not in finished.stderr, "bitsandbytes' own remarks"
    mine, lora = json.loads(finished.stdout)["cases"]
    for case in (mine, lora):
        assert (case["shape"], case["tasks"], case["quantization"]) == ("tiny", tasks, "nf4")
        assert (case["adapter"]["rank"], case["adapter"]["alpha"]) == (8, 16)
        assert case["adapter"]["dropout"] == 0.05
        assert (case["row_length"], case["rows_per_step"], case["rows_per_pass"]) == (512, 8, 8)
        assert case["gradient_checkpointing"] is False
        assert "rows of 512, 8 rows a pass; nothing computed again" in case["picked"]
    assert (mine["adapter"]["up_projections"], mine["adapter"]["temperature"]) == (3, 0.1)
    assert "temperature" not in lora["adapter"]


def test_what_was_picked_stands_below_the_table(
    invoke: Callable[..., Finished], small_recipe: Callable[[], Path]
) -> None:
    path = small_recipe()
    text = path.read_text(encoding="utf-8").replace("  rows_per_step: 2", "  memory: auto")
    path.write_text(text, encoding="utf-8")
    arguments = ("bench", "--recipe", str(path), *TINY[3:])
    auto = invoke(*arguments)
    assert auto.returncode == 0, auto.stderr
    assert " free on the CPU: rows of 512, 8 rows a pass; " in auto.stdout.splitlines()[-1]
    by_hand = invoke(*arguments, "--rows-per-pass", "2")
    assert by_hand.returncode == 0, by_hand.stderr
    assert "rows a pass" not in by_hand.stdout


def test_another_method_than_the_recipes(
    invoke: Callable[..., Finished], small_recipe: Callable[[], Path]
) -> None:
    """It takes what every method reads; the rest is its own default."""
    path = small_recipe()
    path.write_text(
        path.read_text(encoding="utf-8").replace("  gate: embedding", "  up_projections: 2"),
        encoding="utf-8",
    )
    finished = invoke("bench", "--recipe", str(path), "--method", "lora", *TINY[3:], "--json")
    assert finished.returncode == 0, finished.stderr
    (case,) = json.loads(finished.stdout)["cases"]
    assert case["adapter"]["method"] == "lora"
    assert case["adapter"]["dropout"] == 0.1
    assert "up_projections" not in case["adapter"]


def test_a_recipe_is_changed_and_its_data_is_not_asked_for(
    invoke: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MTL_LORA_DATA", raising=False)
    change = ("adapter.rank=4", "adapter.transform_start=0")
    finished = invoke("bench", *change, "--recipe", "real-17", *TINY[1:], "--json")
    assert finished.returncode == 0, finished.stderr
    (case,) = json.loads(finished.stdout)["cases"]
    assert (case["tasks"], case["adapter"]["rank"]) == (17, 4)
    assert case["adapter"]["transform_start"] == 0
    assert case["adapter"]["transform"] == "diagonal"


def test_a_recipe_that_cannot_be_measured(
    invoke: Callable[..., Finished], small_recipe: Callable[[], Path]
) -> None:
    missing = invoke("bench", "--recipe", "glue-llama3-8b")
    assert missing.returncode == 2
    (line,) = missing.stderr.splitlines()
    assert "'meta-llama/Meta-Llama-3-8B' is no folder here" in line
    assert "; --shape measures without it: llama3-8b, " in line
    path = small_recipe()
    text = path.read_text(encoding="utf-8")
    path.write_text("quantization: int8\n" + text, encoding="utf-8")
    eight = invoke("bench", "--recipe", str(path), *TINY[3:])
    assert eight.returncode == 2
    assert eight.stderr == "error: --quantization: expected one of none, nf4, received 'int8'\n"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--shape", "tny"], "--shape: 'tny' is neither a known shape nor a folder; did you mean"),
        (["--shape", "tiny", "--row-length", "468"], "--row-length: the longest example has 469"),
        (["--vs", "pefft"], "--vs: expected one of packed, peft, plain, lora, received 'pefft'"),
        (["--case", "yard"], "--case: expected one of yardstick, growth, received 'yard'"),
        (
            ["--method", "loha"],
            "--method: expected one of mtl-lora, mtl-lora-fine, lora, dora, pissa, mtlora, "
            "moelora, multilora, hydralora, received 'loha'",
        ),
        (["--quantization", "int8"], "--quantization: expected one of none, nf4"),
        (["--modules", ","], "--modules: expected qkvo, all, or names of layers"),
        (["--shape", "tiny", "--modules", "q_prj"], "adapter.target_modules: 'q_prj' matches no"),
        (["--engine", "plain", "--vs", "plain"], "--vs plain: the case itself runs on the plain"),
        (["--method", "lora", "--up-projections", "3"], "--up-projections: lora has one"),
        (["adapter.rank=4"], "'adapter.rank=4': changes are to a recipe; name it with --recipe"),
        (["real-17"], "'real-17': changes are to a recipe; name it with --recipe"),
        (["--recipe", "real-17", "rank"], "'rank': expected key.path=value"),
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

    monkeypatch.setattr("mtl_lora_cli.bench.measure.run_case", full)
    finished = invoke(*TINY)
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr == "error: tiny mtl-lora: does not fit\n"
