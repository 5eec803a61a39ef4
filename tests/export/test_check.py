"""The check after writing: no formality, in a process of its own, and nothing is left that failed it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_lora_cli.errors import CheckError, MtlLoraError, UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.export import check, check_process
from mtl_lora_cli.export import merge as merging
from mtl_lora_cli.export.check import WrittenCheck, questions_about, received
from mtl_lora_cli.export.comparison import Comparison, Distance, Unrounded, compared
from mtl_lora_cli.export.formats import Reference
from mtl_lora_cli.export.formats.merged import Merged
from mtl_lora_cli.export.order import WrittenFolder
from mtl_lora_cli.export.questions import Questions, Scored
from mtl_lora_cli.metrics.intervals import Measured

from .conftest import exported

pytestmark = pytest.mark.slow


def merge(run: Run, folder: Path, task: int = 0, **keys: Any) -> WrittenFolder:
    return exported("merged", run, run.tasks[task], folder, limit=8, **keys)


def compare(run: Run, folder: Path, task: int = 0, **models: Any) -> Comparison:
    """In this process."""
    check = WrittenCheck("merged", [Reference("run")], 8)
    return check.compare(Questions(run, run.tasks[task], Setting(limit=8)), folder)


def test_a_merge_is_compared_in_another_process(run: Run, tmp_path: Path) -> None:
    written = merge(run, tmp_path / "out")
    found = written.comparison
    assert found is not None
    assert (found.split, found.examples, found.dtype) == ("test", 8, "float32")
    assert list(found.models) == ["the run's adapter"]
    assert 0 < found.largest < 1e-3
    assert found.equal == 1.0
    assert found.metrics == found.reference.metrics
    assert found.metrics["accuracy"].low is not None
    here = compare(run, tmp_path / "out")
    assert here.metrics == found.metrics
    assert here.largest == pytest.approx(found.largest, abs=1e-5)
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| {found.largest:.2e} | 100.0% |" in readme


def test_another_tasks_weights_do_not_pass_as_this_ones(run: Run, tmp_path: Path) -> None:
    merge(run, tmp_path / "out", 1, checked=False)
    assert compare(run, tmp_path / "out", 1).holds
    assert not compare(run, tmp_path / "out", 0).holds


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("seen", ["tensor 'model.layers.2.mlp.down_proj.weight'", "largest"])
def test_what_is_spoiled_on_its_way_to_the_disk_lies_aside(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: str
) -> None:
    """By one part in a hundred, in a single matrix: in the tensors, and, were they not looked at, in answers."""
    if seen == "largest":
        monkeypatch.setattr(Merged, "fault", lambda *_: None)
    right = merging.write_merged

    def wrong(plan: Any, folder: Path, say: Any) -> None:
        right(plan, folder, say)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.2.mlp.down_proj.weight"] *= 1.01
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(merging, "write_merged", wrong)
    folder = tmp_path / "here" / "out"
    (folder.parent / "out.failed").mkdir(parents=True)
    with pytest.raises(CheckError) as caught:
        merge(run, folder)
    (line,) = caught.value.lines
    assert f"the merged model differs from the adapted one on task 'sst2': {seen}" in line
    assert line.endswith(f"it lies in {folder}.failed-2")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["out.failed", "out.failed-2"]
    aside = folder.parent / "out.failed-2"
    assert "Do not use this" in (aside / "FAILED.md").read_text(encoding="utf-8")
    assert (aside / "model.safetensors").is_file()
    assert not (aside / "README.md").exists()


def test_without_a_check_the_readme_says_so(run: Run, tmp_path: Path) -> None:
    assert merge(run, tmp_path / "out", checked=False).comparison is None
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "**Not checked.** This was written with `--no-check`" in text


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_a_quantised_run_is_merged_both_ways_with_the_scores_beside_the_adapters(
    four_bit_run: Run, tmp_path: Path, base: str
) -> None:
    written = merge(four_bit_run, tmp_path / "out", base=base)
    found = written.comparison
    assert found is not None
    on_original, on_its_own = (
        "the run's adapter on the original weights",
        "the run's adapter on its nf4 weights",
    )
    first, second = (on_original, on_its_own) if base == "original" else (on_its_own, on_original)
    assert list(found.models) == [first, second]
    assert found.models[first].largest < 1e-3, "it equals the one it was made of"
    assert found.models[second].largest > 1e-2, "and four bits are not the original"
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    told = {
        "original": "These are the **original** weights of the base model, not the nf4 ones",
        "dequantized": "These are the **dequantized** weights, nf4 expanded to float32",
    }
    assert told[base] in text
    assert "over 35 matrices" in text
    for model in ("this one", *found.models):
        assert f"| {model} | " in text


@pytest.mark.usefixtures("in_process")
def test_sixteen_bits_round_what_is_written_and_not_the_comparison(
    train: Callable[..., Run], half: Path, tmp_path: Path
) -> None:
    """A run in bfloat16 on weights in bfloat16: sums in 16 bits differ by ten times as much."""
    run = train(half, dtype="bfloat16", steps=12)
    found = merge(run, tmp_path / "out").comparison
    assert found is not None
    assert (found.dtype, found.allowed, found.equal) == ("float32", 1e-3, 1)
    assert found.unrounded is not None
    assert 100 * found.unrounded.largest < found.largest, "rounding is all that they differ by"
    in_16_bits = compare(run, tmp_path / "out")
    assert (in_16_bits.dtype, in_16_bits.allowed) == ("bfloat16", 0.5)
    assert in_16_bits.unrounded is None
    assert 0 < 3 * found.largest < in_16_bits.largest
    assert in_16_bits.noise is not None
    assert in_16_bits.noise / 5 < in_16_bits.largest < 5 * in_16_bits.noise
    assert not compare(run, merge(run, tmp_path / "other", 1, checked=False).folder, 0).holds


@pytest.fixture(scope="module")
def loud(train: Callable[..., Run], half: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose logits, and all that moves them, are 32 times as large: rounding takes them far."""
    folder = Path(shutil.copytree(half, tmp_path_factory.mktemp("base") / "loud"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 32
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return train(folder, dtype="bfloat16", steps=2)


@pytest.mark.usefixtures("in_process")
def test_however_far_rounding_takes_answers_a_right_merge_holds(loud: Run, tmp_path: Path) -> None:
    found = merge(loud, tmp_path / "out").comparison
    assert found is not None
    assert found.largest > 0.5, "more than was ever allowed"
    assert found.unrounded is not None
    assert found.unrounded.largest < found.allowed == 1e-3
    assert "with the rounding of its weights to bfloat16 taken back" in found.asked
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"taken back {found.unrounded.largest:.2e} on the 8 rows that differ most." in readme
    in_16_bits = compare(loud, tmp_path / "out")
    assert in_16_bits.noise is not None
    assert 0.5 < in_16_bits.largest < in_16_bits.allowed == 3 * in_16_bits.noise


@pytest.mark.parametrize("how", ["no update", "half of one", "another's place", "another norm"])
def test_a_wrong_merge_does_not_hold_however_far_rounding_goes(
    loud: Run, tmp_path: Path, how: str
) -> None:
    """By its answers alone: nobody looks at its tensors here, and all of these move them less than rounding may."""
    folder = merge(loud, tmp_path / "out", checked=False).folder
    file, name = folder / "model.safetensors", "model.layers.2.self_attn.q_proj.weight"
    tensors, before = load_file(file), load_file(loud.base.folder / "model.safetensors")
    if how == "no update":
        tensors[name] = before[name]
    elif how == "half of one":
        tensors[name] = ((tensors[name].float() + before[name].float()) / 2).bfloat16()
    elif how == "another's place":
        other = name.replace("2", "3")
        tensors[name], tensors[other] = tensors[other], tensors[name]
    else:
        tensors["model.layers.1.input_layernorm.weight"] *= 1.02
    save_file(tensors, file, metadata={"format": "pt"})
    check = WrittenCheck("merged", [Reference("run")], 8)
    found = check.compare(questions_about(folder, loud, loud.tasks[0], 8), folder)
    assert not found.holds
    assert found.unrounded is not None
    assert found.unrounded.largest > 1e-3


@pytest.mark.usefixtures("in_process")
def test_a_run_in_float32_on_weights_in_16_bits_is_merged(
    train: Callable[..., Run], half: Path, tmp_path: Path
) -> None:
    found = merge(train(half, steps=12), tmp_path / "out").comparison
    assert found is not None
    assert found.dtype == "float32"
    assert found.allowed == 1e-3 < found.largest, "the checkpoint's own rounding"
    assert found.holds


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_a_quantised_run_in_16_bits_is_checked_in_float32(
    train: Callable[..., Run], stories_folder: Path, tmp_path: Path, base: str
) -> None:
    """Its four bits are those of the weights in its dtype, whatever the check computes in."""
    run = train(stories_folder, dtype="bfloat16", quantization="nf4", steps=12)
    found = merge(run, tmp_path / "out", base=base).comparison
    assert found is not None
    assert (found.dtype, found.allowed) == ("float32", 1e-3)
    assert (found.unrounded is None) == (base == "original"), "the files are in float32"
    assert found.holds


@pytest.mark.parametrize("why", ["room", "eight bits", "another program"])
def test_where_float32_does_not_help_the_runs_dtype_is_taken(
    train: Callable[..., Run],
    stories_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    why: str,
) -> None:
    run = train(stories_folder, dtype="bfloat16")
    written = tmp_path / "model.safetensors"
    written.touch()
    assert questions_about(tmp_path, run, run.tasks[0], 8).dtype == torch.float32
    if why == "room":
        monkeypatch.setattr(check, "free_memory", lambda device: (1_000_000, "x"))
    elif why == "eight bits":
        run = run.but(recipe=run.recipe.model_copy(update={"quantization": "int8"}))
    else:
        written.rename(tmp_path / "adapter.gguf")
    assert questions_about(tmp_path, run, run.tasks[0], 8).dtype == torch.bfloat16


# What the numbers are made of.


def scored(*values: list[float]) -> Scored:
    return Scored([np.array(each) for each in values], None)


def comparison(largest: float, equal: float, allowed: float) -> Comparison:
    return Comparison("test", 40, "x", {}, {"r": Distance({}, largest, equal)}, allowed)


def test_answers_without_an_outcome_are_compared_by_their_scores(run: Run) -> None:
    """As of an engine that scores and does not generate."""
    ours = scored([-1.0, -2.0], [-3.0, -1.0, -2.0])
    theirs = scored([-2.25, -2.0], [-3.0, -1.0, -2.0])
    found = compared(Questions(run, run.tasks[0], Setting(limit=2)), ours, {"them": theirs}, 1)
    assert (found.largest, found.equal) == (1.25, 0.5)
    assert found.metrics == found.reference.metrics == {}


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_no_number_never_holds(run: Run, bad: float) -> None:
    poisoned = scored([bad, -2.0])
    questions = Questions(run, run.tasks[0], Setting(limit=2))
    assert not compared(questions, poisoned, {"them": poisoned}, 1).holds


def test_near_ties_may_fall_differently_where_the_dtype_has_some() -> None:
    assert comparison(0.1, 30 / 40, allowed=0.5).holds
    assert not comparison(0.6, 1.0, allowed=0.5).holds
    assert comparison(1e-4, 1.0, allowed=1e-3).holds
    assert not comparison(1e-4, 39 / 40, allowed=1e-3).holds
    assert comparison(0.1, 1.0, allowed=0.5).asked == "to 0.5 in log-probabilities"
    assert comparison(0.0, 1.0, allowed=1e-3).asked.endswith(" and in all predictions")


def test_a_comparison_travels_as_json() -> None:
    measured = {"accuracy": Measured(0.5, 0.25, 0.75), "f1": Measured(None, why="one class")}
    models = {"a": Distance(measured, 0.1, 1.0), "b": Distance({}, float("nan"), 0.0)}
    undone = Unrounded(8, 1e-5, "bfloat16")
    sent = Comparison("test", 3, "float32", measured, models, 0.001, {}, undone, 0.25)
    received = Comparison.from_json(json.loads(json.dumps(asdict(sent))))
    assert repr(received) == repr(sent)  # NaN equals nothing
    assert list(received.models) == ["a", "b"]


def test_a_free_answer_is_generated_and_its_log_probability_compared(
    train: Callable[..., Run], stories_folder: Path, small_data: Path, tmp_path: Path
) -> None:
    template = tmp_path / "free.yaml"
    template.write_text(
        "description: Go on.\nprompt: '{{ sentence }}'\nanswer: '{{ sentence[:4] }}'\n"
    )
    task = {"name": "free", "template": str(template), "source": str(small_data / "sst2")}
    run = train(stories_folder, tasks=[task])
    merge(run, tmp_path / "out", checked=False)
    found = compare(run, tmp_path / "out")
    assert found.holds
    assert found.metrics["exact_match"].low is not None


# The other process.


def test_its_errors_are_those_of_the_one_who_asked(run: Run, tmp_path: Path) -> None:
    check = WrittenCheck("merged", [Reference("run")], 2)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds no safetensors weights"):
        received(check_process.answer(check.request(run, run.tasks[0], tmp_path)))


def test_a_fault_of_its_own_is_passed_on_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'run'") as caught:
        received(check_process.answer({}))
    assert "check_process.py" in caught.value.__notes__[0]


def test_a_process_that_is_killed_is_told_from_one_that_answers(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    with pytest.raises(MtlLoraError, match="the check's process ended with code -9"):
        WrittenCheck("merged", [Reference("run")], 2).run(run, run.tasks[0], tmp_path)


def test_it_ends_when_nobody_waits_for_it() -> None:
    module = "mtl_lora_cli.export.check_process"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-m", module, "{}"], stdin=pipe, stdout=pipe) as started:
        assert started.stdin is not None
        assert started.stdout is not None
        started.stdin.close()
        assert started.wait(timeout=60) == 1
        assert started.stdout.read() == b""
