"""The best look's checkpoint stays and becomes the adapter; without a better one the run ends early."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_lora_cli.adapters.files import read_tensors, state_of
from mtl_lora_cli.evaluation.opened import open_run
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.training import ValidationSettings
from mtl_lora_cli.runs.folder import RunFolder, read_json
from mtl_lora_cli.training.best import Best, Mark, best_after
from mtl_lora_cli.training.checkpoints import (
    Position,
    Snapshot,
    newest_checkpoint,
    write_checkpoint,
)
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.run import resume, start

from .test_observers import lines, same_adapter

pytestmark = pytest.mark.slow

# At such a rate no answer ever changes: the first look stays the best.
STILL = {"learning_rate": 1e-12}
# At such a rate losses rise and fall.
WILD = (
    "training.learning_rate=0.1",
    "training.schedule=constant",
    "training.warmup=0",
    "training.max_steps=5",
)
LOSSES = "training.validation={every: 1, examples: 10, metric: false, best: macro}"


def folders(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def events_of(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == kind]


def test_of_equal_looks_the_first_is_the_best() -> None:
    def followed(values: list[float | None], higher: bool) -> list[tuple[int, int] | None]:
        best, found = None, []
        for step, value in enumerate(values, start=1):
            best = best_after(best, Mark("x", value, higher), step)
            found.append(None if best is None else (best.step, best.waited))
        return found

    values = [None, 0.5, 0.4, 0.5, None, 0.6]
    assert followed(values, True) == [None, (2, 0), (2, 1), (2, 2), (2, 3), (6, 0)]
    assert followed(values, False) == [None, (2, 0), (3, 0), (3, 1), (3, 2), (3, 3)]


def test_marks_of_other_things_are_not_compared() -> None:
    before = Best("a", 3, 0.9, waited=4)
    assert best_after(before, Mark("b", 0.1, True), 5) == Best("b", 5, 0.1)
    assert best_after(before, Mark("b", None, True), 5) is None


@pytest.fixture(scope="module")
def wild(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run whose best look is not its last."""
    overrides = [*WILD, LOSSES, "training.keep_checkpoints=1", "training.checkpoint_every=null"]
    path = tmp_path_factory.mktemp("wild") / "run"
    return start(prepare(load_recipe(recipe_file, overrides)), path)


def test_the_adapter_is_that_of_the_lowest_loss(wild: RunFolder) -> None:
    losses = {event["step"]: event["macro"]["loss"] for event in events_of(wild, "validation")}
    assert list(losses) == [1, 2, 3, 4, 5]
    best = min(losses, key=lambda step: losses[step])
    assert best < 5, "nothing is shown by a run whose last look is its best"
    assert folders(wild) == sorted({f"step-{best:06d}", "step-000005"})
    told = events_of(wild, "best")[-1]
    assert (told["step"], told["value"]) == (best, losses[best])
    found, kept = (
        read_tensors(path) for path in (wild.adapter, wild.checkpoints / f"step-{best:06d}")
    )
    last = read_tensors(wild.checkpoints / "step-000005")
    assert all(torch.equal(found[name], kept[name]) for name in found)
    assert any(not torch.equal(found[name], last[name]) for name in found)
    assert f"This is the best look's adapter: step {best}, macro loss on 30 held-out examples" in (
        wild.adapter / "README.md"
    ).read_text(encoding="utf-8")
    open_run(wild)


def test_every_improvement_has_a_line_behind_its_look(wild: RunFolder) -> None:
    best, expected = float("inf"), []
    for event in events_of(wild, "validation"):
        if event["macro"]["loss"] < best:
            best = event["macro"]["loss"]
            expected.append((event["step"], best))
    assert [(e["step"], e["value"]) for e in events_of(wild, "best")] == expected
    kinds = [event["event"] for event in wild.events()]
    assert all(kinds[i - 1] == "validation" for i, kind in enumerate(kinds) if kind == "best")


@pytest.mark.parametrize("gone", ["adapter", "last checkpoint"])
def test_a_finished_run_that_lost_its_end_ends_the_same(
    wild: RunFolder, tmp_path: Path, gone: str
) -> None:
    copy = RunFolder(Path(shutil.copytree(wild.path, tmp_path / "copy")))
    shutil.rmtree(copy.adapter)
    if gone != "adapter":
        shutil.rmtree(copy.checkpoints / "step-000005")
    resume(copy, None, [])
    ours, theirs = read_tensors(copy.adapter), read_tensors(wild.adapter)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert events_of(copy, "validation") == events_of(wild, "validation")
    assert events_of(copy, "best") == events_of(wild, "best")


def test_a_best_checkpoint_that_is_gone_is_told_and_forgotten(
    wild: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = RunFolder(Path(shutil.copytree(wild.path, tmp_path / "copy")))
    shutil.rmtree(copy.adapter)
    best = events_of(wild, "best")[-1]["step"]
    (copy.checkpoints / f"step-{best:06d}" / "state.json").unlink()
    resume(copy, None, [])
    said = capsys.readouterr().err
    assert f"note: the best so far, step {best}, macro loss on 30 held-out examples" in said
    last = read_tensors(copy.checkpoints / "step-000005")
    found = read_tensors(copy.adapter)
    assert all(torch.equal(found[name], last[name]) for name in found)


def test_the_best_checkpoint_outlives_the_newest(small: Callable[..., Any]) -> None:
    settings = ValidationSettings(every=2, examples=5, best="sst2")
    run = small(validation=settings, checkpoint_every=1, keep_checkpoints=2, **STILL).train()
    assert folders(run.run) == ["step-000002", "step-000005", "step-000006"]
    best = run.trainer.position.best
    assert best is not None
    assert (best.step, best.waited) == (2, 2)
    state = read_json(run.run.checkpoints / "step-000005" / "state.json")
    assert state["best"] == {"of": best.of, "step": 2, "value": best.value, "waited": 1}


def test_patience_ends_the_run(small: Callable[..., Any]) -> None:
    settings = ValidationSettings(every=1, examples=5, best="sst2", patience=2)
    run = small(validation=settings, checkpoint_every=None, **STILL).train()
    assert [e["step"] for e in run.events if e["event"] == "validation"] == [1, 2, 3]
    assert folders(run.run) == ["step-000001", "step-000003"]
    assert run.trainer.settled
    patient = small(validation=settings.model_copy(update={"patience": 3}), **STILL).train()
    assert [e["step"] for e in patient.events if e["event"] == "validation"] == [1, 2, 3, 4]


def test_a_run_that_ends_early_is_finished(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [
        "training.learning_rate=1e-12",
        "training.validation={every: 1, examples: 5, best: sst2, patience: 2}",
    ]
    run = start(prepare(load_recipe(recipe_file, overrides)), tmp_path / "run")
    said = capsys.readouterr().err
    assert "stopped after step 3/6: 2 looks were no better" in said
    assert "the adapter is that of the best look: step 1, sst2 accuracy on 5 held-out" in said
    first, found = read_tensors(run.checkpoints / "step-000001"), read_tensors(run.adapter)
    assert all(torch.equal(first[name], found[name]) for name in found)
    shutil.rmtree(run.adapter)
    before = list(run.events())
    resume(run, None, [])  # killed between its last checkpoint and its adapter
    assert list(run.events()) == before
    again = read_tensors(run.adapter)
    assert all(torch.equal(first[name], again[name]) for name in again)


@pytest.mark.parametrize(
    ("stop", "rate", "patience"),
    [
        (3, 1e-12, 1),
        *(
            pytest.param(*one, marks=pytest.mark.long)
            for one in ((1, 1e-12, 1), (4, 1e-12, 2), (2, 0.1, None))
        ),
    ],
)
def test_a_resumed_run_has_the_same_best_and_the_same_end(
    small: Callable[..., Any], stop: int, rate: float, patience: int | None
) -> None:
    settings = ValidationSettings(every=2, examples=5, best="macro", patience=patience)
    common = {"validation": settings, "learning_rate": rate}
    whole = small(**common).train()
    stopped = small(**common, checkpoint_every=None).train(stop_after=stop)
    again = small(**common, checkpoint_every=None, folder=stopped.run.path)
    assert again.trainer.resume(newest_checkpoint(stopped.run.checkpoints)) is None
    again.train()
    assert lines(again) == lines(whole)
    assert same_adapter(again, whole)
    assert again.trainer.position.best == whole.trainer.position.best
    best = again.trainer.position.best
    assert best is not None
    one, two = (
        read_tensors(run.run.checkpoints / f"step-{best.step:06d}") for run in (again, whole)
    )
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_another_best_counts_anew(small: Callable[..., Any]) -> None:
    settings = ValidationSettings(every=1, examples=5, best="sst2")
    stopped = small(validation=settings, **STILL).train(stop_after=3)
    other = settings.model_copy(update={"best": "rte"})
    again = small(validation=other, **STILL, folder=stopped.run.path)
    again.trainer.resume(newest_checkpoint(stopped.run.checkpoints))
    again.train()
    best = again.trainer.position.best
    assert best is not None
    assert (best.step, best.of) == (4, "rte accuracy on 5 held-out examples")
    without = small(validation=None, **STILL, folder=stopped.run.path)
    without.trainer.resume(newest_checkpoint(stopped.run.checkpoints))
    assert without.trainer.position.best is None


def test_where_steps_run_ahead_the_best_is_the_same(
    small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtl_lora_cli.training.step import Stepper

    monkeypatch.setattr(Stepper, "mark", lambda self: None)
    settings = ValidationSettings(every=2, examples=5, best="sst2", patience=1)
    whole = small(validation=settings, **STILL).train()
    ahead = small(validation=settings, **STILL)
    ahead.trainer.stepper.runs_ahead = True
    ahead.train()
    assert lines(ahead) == lines(whole)
    assert folders(ahead.run) == folders(whole.run)
    assert ahead.trainer.position.step == 4


def test_what_any_kept_checkpoint_calls_the_best_is_kept(
    small: Callable[..., Any], tmp_path: Path
) -> None:
    """Where the newest is found damaged, the run goes on from the one before, and its best is there."""
    adapter, folder = small().trainer.adapter, tmp_path / "checkpoints"
    folder.mkdir()

    def saved(step: int, best: int) -> list[str]:
        position = Position(step, 0, 0.0, 0, Best("x", best, 0.5))
        write_checkpoint(folder, Snapshot(position, state_of(adapter, {}), {}, []), keep=2)
        return sorted(path.name for path in folder.iterdir())

    assert saved(1, 1) == ["step-000001"]
    assert saved(2, 1) == ["step-000001", "step-000002"]
    assert saved(3, 1) == ["step-000001", "step-000002", "step-000003"]
    assert saved(4, 4) == ["step-000001", "step-000003", "step-000004"]
    assert saved(5, 4) == ["step-000004", "step-000005"]
