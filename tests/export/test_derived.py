"""Runs made of a run: tasks leave it, and others are joined to one adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.answers import answer
from mtl_lora_cli.evaluation.evaluate import Setting, held_out
from mtl_lora_cli.evaluation.opened import Run, open_run
from mtl_lora_cli.export.derived import without_tasks
from mtl_lora_cli.export.joined import join_tasks, joined, parse_weights, require_way
from mtl_lora_cli.runs.folder import RunFolder, read_json

from .conftest import exported

TASKS = ("sst2", "home_depot")


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Run:
    """The run in a folder of its own: what is made of it lies beside it."""
    return open_run(RunFolder(Path(shutil.copytree(run.folder.path, tmp_path / "runs" / "mine"))))


def updates(run: Run, task: int) -> dict[str, Tensor]:
    """ΔW of each layer, float64."""
    found = {}
    for path, layer in run.adapter.layers.items():
        down, up = layer.task_update(task)
        found[path] = run.adapter.config.scale(layer.rank) * up @ down
    return found


@pytest.mark.parametrize(
    "method",
    [
        "mtl-lora",
        "mtlora",
        pytest.param("moelora", marks=pytest.mark.long),
        pytest.param("lora", marks=pytest.mark.long),
    ],
)
def test_a_task_leaves_and_the_others_are_the_same(
    train: Callable[..., Run], stories_folder: Path, method: str
) -> None:
    adapter = {"method": method, "target_modules": ["q_proj", "down_proj"], "rank": 8}
    run = train(stories_folder, tasks=("sst2", "cola", "home_depot"), adapter=adapter)
    made = open_run(without_tasks(run, ["cola"]))
    assert made.folder.name == "mine-without-cola"
    assert [(task.name, task.id) for task in made.tasks] == [("sst2", 0), ("home_depot", 1)]
    assert [entry.name for entry in made.recipe.tasks] == ["sst2", "home_depot"]
    for name, tensor in made.file.tensors.items():
        before = run.file.tensors[name]
        own = before[[0, 2]] if run.adapter.role(name).per_task else before
        assert torch.equal(tensor, own)
    for old, new in ((0, 0), (2, 1)):
        task = run.tasks[old]
        rows = held_out(task, Setting(limit=5))
        (before,), (after,) = (
            answer(one, [one.tasks[n]], [rows], Setting()) for one, n in ((run, old), (made, new))
        )
        assert before.scores is not None
        assert after.scores is not None
        for one, other in zip(before.scores, after.scores, strict=True):
            assert one.tolist() == pytest.approx(
                other.tolist(), abs=0 if method != "mtlora" else 1e-5
            )
    assert read_json(made.folder.tasks)["made_of"]["without"] == ["cola"]


@pytest.mark.parametrize(
    ("names", "name", "said"),
    [
        (["sst3"], None, "unknown task 'sst3'; did you mean 'sst2'?"),
        (["sst2", "sst2"], None, "stands twice"),
        (["sst2", "home_depot"], None, "no task would stay"),
        (["sst2"], "mine", "exists; choose another --name"),
        (["sst2"], "a/b", "cannot name a run"),
    ],
)
def test_what_cannot_leave(copy: Run, names: list[str], name: str | None, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        without_tasks(copy, names, name)
    assert [path.name for path in copy.folder.path.parent.iterdir()] == ["mine"]


@pytest.mark.parametrize("method", ["mtl-lora", "mtlora"])
def test_linear_is_the_weighted_sum(
    train: Callable[..., Run], stories_folder: Path, method: str
) -> None:
    adapter = {"method": method, "target_modules": ["q_proj", "down_proj"], "rank": 4}
    run = train(stories_folder, adapter=adapter)
    made = open_run(join_tasks(run, TASKS, [0.7, -0.2]))
    assert made.recipe.adapter.method == "lora"
    assert made.recipe.adapter.rank == (4 if method == "mtl-lora" else 10)
    one, two = updates(run, 0), updates(run, 1)
    for task in (0, 1):
        for path, found in updates(made, task).items():
            expected = 0.7 * one[path] - 0.2 * two[path]
            assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_what_is_joined_is_what_peft_makes_of_the_exported_tasks(copy: Run, tmp_path: Path) -> None:
    """By `add_weighted_adapter`, which has had no part in ours: `cat` is the sum, `ties_svd` TIES at full rank."""
    peft = pytest.importorskip("peft")
    for task, name in enumerate(TASKS):
        exported("peft", copy, copy.tasks[task], tmp_path / name, checked=False)
    model = copy.load()
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "sst2"), adapter_name="sst2")
    theirs.load_adapter(str(tmp_path / "home_depot"), adapter_name="home_depot")
    weights = [0.6, 0.4]
    theirs.add_weighted_adapter([*TASKS], weights, "linear", combination_type="cat")
    theirs.add_weighted_adapter(
        [*TASKS], weights, "ties", combination_type="ties_svd", svd_rank=64, density=0.5
    )
    for how in ("linear", "ties"):
        made = open_run(join_tasks(copy, TASKS, weights, how=how, name=how))  # type: ignore[arg-type]
        for path, ours in updates(made, 0).items():
            layer = theirs.base_model.model.get_submodule(path)
            delta = layer.get_delta_weight(how).double()
            assert float((ours - delta).abs().max()) < 1e-5 * float(delta.abs().max())


def test_dare_is_drawn_by_its_seed(copy: Run) -> None:
    pytest.importorskip("peft")
    factors: list[dict[str, Any]] = []
    for task in (0, 1):
        factors.append(
            {path: layer.task_update(task) for path, layer in copy.adapter.layers.items()}
        )
    before = torch.get_rng_state()

    def made(seed: int) -> dict[str, Tensor]:
        found = joined(factors, [0.5, 0.5], how="dare_ties", density=0.3, seed=seed)
        return {path: up @ down for path, (down, up) in found.items()}

    one, same, other = made(1), made(1), made(2)
    assert all(torch.equal(one[path], same[path]) for path in one)
    assert any(not torch.allclose(one[path], other[path]) for path in one)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.usefixtures("in_process")
def test_a_joined_run_is_merged_and_exported_like_any_other(copy: Run, tmp_path: Path) -> None:
    made = open_run(join_tasks(copy, TASKS, [0.5, 0.5]))
    for kind in ("merged", "peft"):
        found = exported(kind, made, made.tasks[1], tmp_path / kind, limit=6).comparison
        assert found is not None
        assert found.equal == 1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: parse_weights("1,x", 2), "expected numbers with commas between"),
        (lambda: parse_weights("1", 2), "expected 2 finite numbers"),
        (lambda: parse_weights("1,nan", 2), "expected 2 finite numbers"),
        (lambda: require_way("tie", 0.5), "did you mean 'ties'?"),
        (lambda: require_way("ties", 0.0), "--density"),
    ],
)
def test_what_cannot_be_joined(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call()
