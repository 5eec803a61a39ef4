"""How far runs came, by what lies in their folders; and removing them, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.runs import listing
from mtl_lora_cli.runs.folder import RunFolder, create_run, mark_latest, save_json
from mtl_lora_cli.runs.listing import (
    Score,
    digest_of,
    last_step,
    newest_first,
    newest_scores,
    summary,
)
from mtl_lora_cli.runs.lock import only_writer
from mtl_lora_cli.runs.removal import find_removable, remove_run

Make = Callable[..., RunFolder]
LONG_AGO = 3600.0


def step(number: int, **more: Any) -> str:
    return json.dumps({"event": "step", "step": number, "seconds": 0.5, **more}) + "\n"


def age(path: Path, seconds: float) -> None:
    for file in (path, *path.rglob("*")):
        os.utime(file, (time.time() - seconds,) * 2)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(name, steps=…, checkpoints=…, finished=…, ago=…)`: a run as a process leaves it."""

    def write(
        name: str,
        *,
        steps: int = 0,
        checkpoints: tuple[int, ...] = (),
        finished: bool = False,
        best: dict[str, Any] | None = None,
        ago: float = LONG_AGO,
    ) -> RunFolder:
        run = create_run(tmp_path / "runs" / name)
        run.recipe.write_text("base_model: tiny\n", encoding="utf-8")
        save_json(run.tasks, {"tasks": [{"name": "one"}, {"name": "two"}]})
        run.metrics.write_text("".join(step(n + 1) for n in range(steps)), encoding="utf-8")
        for number in checkpoints:
            folder = run.checkpoints / f"step-{number:06d}"
            folder.mkdir(parents=True)
            save_json(folder / "state.json", {"step": number, "best": best})
            (folder / "COMPLETE").write_text("1\n", encoding="utf-8")
        if finished:
            run.adapter.mkdir()
        mark_latest(run)
        age(run.path, ago)
        return run

    return write


def result(run: RunFolder, identity: str, **entry: Any) -> None:
    run.evaluations.mkdir(exist_ok=True)
    save_json(run.evaluations / f"{identity}.json", {"id": identity, **entry})
    known = [path.stem for path in sorted(run.evaluations.glob("r*.json"))]
    save_json(run.evaluations / "index.json", {"evaluations": known})


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"steps": 4, "checkpoints": (2, 4), "finished": True}, listing.FINISHED),
        ({"steps": 4, "checkpoints": (2, 4)}, listing.STOPPED),
        ({"steps": 5, "checkpoints": (2, 4)}, listing.UNFINISHED),
        ({"steps": 1}, listing.UNFINISHED),
        ({}, listing.UNFINISHED),
        ({"steps": 5, "ago": 2.0}, listing.PERHAPS),
        ({"steps": 5, "finished": True, "ago": 2.0}, listing.FINISHED),
    ],
    ids=str,
)
def test_status(make: Make, given: dict[str, Any], status: str) -> None:
    found = summary(make("run", **given))
    assert (found.status, found.step) == (status, given.get("steps", 0))
    assert found.steps is None, "tasks.json does not say"
    assert found.checkpoints == list(given.get("checkpoints", ()))


def test_a_run_whose_lock_is_held_is_running(make: Make) -> None:
    run = make("run", steps=3)
    with only_writer(run):
        age(run.path, 1000.0)
        assert summary(run).status == listing.RUNNING
    age(run.path, 1000.0)
    assert summary(run).status == listing.UNFINISHED


def test_ten_long_steps_are_waited_for(make: Make) -> None:
    run = make("run")
    run.metrics.write_text(step(1, seconds=30.0), encoding="utf-8")
    for ago, status in ((200, listing.PERHAPS), (400, listing.UNFINISHED)):
        age(run.path, ago)
        assert summary(run).status == status


@pytest.mark.parametrize("behind", ["", '{"event": "st', "garbage\n", '{"event": "validation"}\n'])
def test_the_last_whole_step_counts(make: Make, behind: str) -> None:
    run = make("run", steps=3)
    run.metrics.write_text(run.metrics.read_text() + behind, encoding="utf-8")
    assert last_step(run.metrics)["step"] == 3


def test_a_step_longer_than_what_is_read_first_is_found(make: Make) -> None:
    run = make("run")
    losses = {f"task-{number}": 0.123456789 for number in range(6000)}
    run.metrics.write_text(step(1) + step(2, task_loss=losses), encoding="utf-8")
    assert run.metrics.stat().st_size > 2**17
    assert last_step(run.metrics)["step"] == 2


def test_the_newest_result_of_the_adapter_is_the_score(make: Make) -> None:
    run = make("run", finished=True)
    accuracy = {"accuracy": {"value": 0.5}, "f1": {"value": 0.9}}
    result(run, "r1", task="one", model="adapter", examples=10, metrics=accuracy)
    accuracy = {"accuracy": {"value": 0.75}}
    result(run, "r2", task="one", model="adapter", examples=20, metrics=accuracy)
    result(run, "r3", task="one", model="base", examples=20, metrics={"accuracy": {"value": 0.1}})
    result(run, "r4", task="two", model="adapter", examples=5, metrics={"f1": {"value": None}})
    found = summary(run)
    assert found.scores == {"one": listing.Score("accuracy", 0.75, 20)}
    assert found.mean == 0.75
    result(run, "r5", task="two", model="adapter", examples=5, metrics={"f1": {"value": 0.25}})
    assert summary(run).mean == 0.5


def test_the_best_look_is_that_of_the_newest_checkpoint(make: Make) -> None:
    best = {"of": "macro metric", "step": 2, "value": 0.75, "waited": 1}
    found = summary(make("run", steps=4, checkpoints=(2, 4), best=best))
    assert found.best == {"of": "macro metric", "step": 2, "value": 0.75}
    assert summary(make("other", steps=4, checkpoints=(4,))).best is None


@pytest.mark.parametrize("damage", ["tasks.json", "evaluations/r1.json", "evaluations/index.json"])
def test_damage_is_told_and_stops_nobody(make: Make, damage: str) -> None:
    run = make("run", steps=2, finished=True)
    result(run, "r1", task="one", model="adapter", examples=1, metrics={"f1": {"value": 1.0}})
    (run.path / damage).write_text('{"format_version": 1}', encoding="utf-8")
    found = summary(run)
    assert (found.status, found.step) == (listing.DAMAGED, 2)
    assert (found.reason and "damaged" in found.reason) or "KeyError" in str(found.reason)


def test_the_size_is_that_of_all_files(make: Make) -> None:
    run = make("run", finished=True)
    before = summary(run).bytes
    (run.adapter / "weights").write_bytes(bytes(1000))
    (run.adapter / "link").symlink_to(run.adapter / "weights")
    link = (run.adapter / "link").lstat().st_size
    assert summary(run).bytes == before + 1000 + link


def test_the_newest_comes_first(make: Make) -> None:
    for name, ago in (("old", 300.0), ("new", 100.0), ("older", 500.0)):
        make(name, ago=ago)
    directory = make("x", ago=200.0).path.parent
    assert [run.name for run in newest_first(directory)] == ["new", "x", "old", "older"]
    assert newest_first(directory / "none") == []


def removed(make: Make, *names: str, force: bool = False) -> list[str]:
    directory = make("keep", ago=LONG_AGO).path.parent
    for run in find_removable(names, directory, force=force):
        remove_run(run)
    return sorted(path.name for path in directory.iterdir())


def test_what_is_asked_for_is_removed(make: Make) -> None:
    make("a")
    make("b")
    assert removed(make, "a", "a") == ["b", "keep", "latest"]


def test_latest_names_the_newest_one_left(make: Make) -> None:
    make("older", ago=900.0)
    directory = make("newer", ago=800.0).path.parent
    mark_latest(make("gone"))
    remove_run(RunFolder(directory / "gone"))
    assert (directory / "latest").read_text() == "newer\n"
    remove_run(RunFolder(directory / "older"))
    assert (directory / "latest").read_text() == "newer\n"
    remove_run(RunFolder(directory / "newer"))
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("name", ["..", ".", "../other", "sub/run", "latest", "nothing", ""])
def test_nothing_else_is_removed(make: Make, tmp_path: Path, name: str) -> None:
    for other in (tmp_path / "other", tmp_path / "runs" / "sub" / "run"):
        other.mkdir(parents=True)
        (other / "recipe.yaml").write_text("", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=r"lies outside of|no run"):
        removed(make, name)
    assert set(before) <= set(tmp_path.rglob("*"))


def test_one_that_cannot_be_removed_keeps_all(make: Make) -> None:
    make("a")
    with pytest.raises(UsageError, match="no run 'typo'"):
        removed(make, "a", "typo")
    assert (make("z").path.parent / "a").is_dir()


def test_a_path_below_the_folder_is_a_name_too(make: Make) -> None:
    run = make("a")
    assert removed(make, str(run.path)) == ["keep", "latest"]


def test_a_link_goes_and_what_it_leads_to_stays(make: Make, tmp_path: Path) -> None:
    target = create_run(tmp_path / "elsewhere")
    target.recipe.write_text("", encoding="utf-8")
    age(target.path, LONG_AGO)
    directory = make("a").path.parent
    (directory / "link").symlink_to(target.path)
    assert removed(make, "link") == ["a", "keep", "latest"]
    assert target.recipe.is_file()


def test_a_link_inside_a_run_is_not_followed(make: Make, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x", encoding="utf-8")
    (make("a").path / "link").symlink_to(outside)
    removed(make, "a")
    assert (outside / "precious").is_file()


def test_a_running_run_stays_unless_forced(make: Make) -> None:
    run = make("a", steps=1)
    with only_writer(run):
        with pytest.raises(UsageError, match="'a' seems to be running; stop it first, or"):
            removed(make, "a")
        assert run.path.is_dir()
    with run.metrics.open("a", encoding="utf-8"):
        find_removable(["a"], run.path.parent, force=True)
    assert run.path.is_dir()


def test_what_a_killed_removal_leaves_is_no_run(make: Make) -> None:
    run = make("a")
    run.path.rename(run.path.parent / ".a.killed.partial")
    make("b")
    assert [one.name for one in newest_first(run.path.parent)] == ["b"]
    make("a")
    assert not (run.path.parent / ".a.killed.partial").exists()


def test_a_digest_in_the_index_is_what_the_result_says(make: Make) -> None:
    """Results hold every row; an index of an early version has no digests, and they are read."""
    run = make("run")
    measured = {"f1": {"value": 0.25}, "accuracy": {"value": 0.75}}
    whole = {"task": "one", "model": "adapter", "examples": 4, "metrics": measured}
    found = []
    for more in ({}, {"titles": {"f1": "f1 (yes)"}}):
        result(run, "r1", **whole, **more)
        read = newest_scores(run)
        index = {"evaluations": ["r1"], "digests": {"r1": digest_of({**whole, **more})}}
        save_json(run.evaluations / "index.json", index)
        (run.evaluations / "r1.json").unlink()
        assert newest_scores(run) == read
        found.append(read["one"])
    assert found == [Score("f1", 0.25, 4), Score("f1 (yes)", 0.25, 4)]


def test_fifteen_hundred_runs_are_listed_in_two_seconds(make: Make) -> None:
    """By what it takes of a processor; a third is unfinished."""
    one = make("one", steps=100, checkpoints=(50,))
    other = make("other", steps=100, checkpoints=(100,), finished=True)
    rows = {"gold": [0, 1] * 300, "predicted": [1, 1] * 300}
    scored = {"model": "adapter", "examples": 600, "metrics": {"accuracy": {"value": 0.5}}}
    for number, task in enumerate(("one", "two")):
        result(other, f"r{number}", task=task, **scored, **rows)
    runs = one.path.parent
    for number in range(1498):
        shutil.copytree(
            (other if number % 3 else one).path, runs / f"r{number}", copy_function=os.link
        )
    before = time.process_time()
    found = [summary(run) for run in newest_first(runs)]
    taken = time.process_time() - before
    assert len(found) == 1500
    assert {entry.status for entry in found} == {listing.UNFINISHED, listing.FINISHED}
    assert taken < 2, taken
