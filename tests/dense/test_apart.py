"""Tasks that share pictures, each by itself: rows of one task, gradients held against each other, shares that follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mtl_lora_cli.data.mixture import generator_of
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.checkpoints import newest_checkpoint
from mtl_lora_cli.training.gradients import shared_parameters
from mtl_lora_cli.training.loop import Trainer
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import ReadyRun

from ..training.conftest import Small
from ..training.test_following import naive_pcgrad, told
from .conftest import Backbones
from .test_training import TASKS, TEMPLATES, pictures, recipe_of

Built = Callable[..., Small]
STEPS = 8
# Each in a run of its own; together all that follows the losses or keeps tasks apart.
KINDS: dict[str, tuple[str, ...]] = {
    "dynamic": (
        "training.rows=one_task",
        "mixing={dynamic: progress, every: 4, start: uniform}",
        "training.balance={method: gradnorm, every: 2}",
    ),
    "stages": (
        "training.rows=one_task",
        "training.epochs=1",
        "training.stages=[{tasks: [classes, depth], epochs: 1}, {tasks: [depth, normals, edges]}]",
        "training.balance=pcgrad",
    ),
    "shared": ("training.balance=uncertainty",),
}


@pytest.fixture(scope="module")
def recipe(backbones: Backbones, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("apart")
    (folder / "pictures").mkdir()
    lines = pictures(folder / "pictures", 7, np.random.default_rng(3))
    (folder / "pictures" / "train.jsonl").write_text("\n".join(lines))
    for task, keys in TEMPLATES.items():
        written = {"description": "A map.", "image": "image", "target": task, **keys}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(written))
    own = recipe_of(backbones("swin").folder, "swin", max_steps=STEPS, rows_per_step=2)
    own["tasks"] = [{**task, "template": str(folder / task["template"])} for task in own["tasks"]]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(own))
    return path


@pytest.fixture
def built(recipe: Path, tmp_path: Path) -> Built:
    def build(*overrides: str, folder: Path | None = None) -> Small:
        prepared = prepare(load_recipe(recipe, overrides))
        host, adapter = prepared.build()
        path = folder or tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        path.mkdir(exist_ok=True)
        run = RunFolder(path)
        ready = ReadyRun(prepared, run, host, adapter)
        return Small(Trainer(ready, prepared.observers(host, adapter)), run)

    return build


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["dynamic", *(pytest.param(one, marks=pytest.mark.long) for one in ("stages", "shared"))],
)
def test_a_stopped_run_goes_on_to_the_last_bit(built: Built, kind: str) -> None:
    whole = built(*KINDS[kind]).train()
    stopped = built(*KINDS[kind]).train(stop_after=5)
    again = built(*KINDS[kind], folder=stopped.run.path)
    torch.manual_seed(999)
    again.trainer.resume(newest_checkpoint(stopped.run.checkpoints))
    again.train()
    assert told(again) == told(whole)
    ours, theirs = again.tensors, whole.tensors
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    events = told(whole)
    assert {one["event"] for one in events} == {
        "dynamic": {"step", "mixing", "balance"},
        "stages": {"step"},
        "shared": {"step", "balance"},
    }[kind]
    if kind == "stages":
        seen = [set(one["examples"]) for one in events if one["event"] == "step"]
        assert seen[0] <= {"classes", "depth"} and seen[-1] <= {"depth", "normals", "edges"}


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["mixed", "one_task"])
def test_projected_gradients_of_maps_are_the_papers(built: Built, rows: str) -> None:
    """Beside autograd over the whole batch, unit by unit, and algorithm 1 of arXiv 2001.06782."""
    run = built("training.balance=pcgrad", f"training.rows={rows}", "training.rows_per_step=5",
                "training.rows_per_pass=2")  # fmt: skip
    trainer: Any = run.trainer
    trainer.host.train()
    prepared = trainer.stepper.prepare(0)
    trainer.stepper.accumulate(prepared)
    planned = prepared.planned
    assert all(len(owner.unique()) == 1 for owner in planned.owners)
    learning = trainer.adapter.tensors()
    shared = [name for name in shared_parameters(trainer.adapter) if learning[name].requires_grad]
    got = torch.cat([learning[name].grad.reshape(-1) for name in shared]).double().numpy()
    own = {name: t.grad for name, t in learning.items() if name not in shared}
    dataset = trainer.data.dataset("answer").at(0, 0)
    batch = dataset.collate(planned.rows).to(torch.device("cpu"))
    losses = trainer.host.losses(batch)
    assert len(losses) == planned.count and set(batch.owners.tolist()) == set(planned.tasks)
    each = []
    for task in planned.tasks:
        loss = losses[batch.owners == task].sum() / planned.count
        found = torch.autograd.grad(
            loss, [learning[n] for n in shared], retain_graph=True, allow_unused=True
        )
        pairs = zip(found, shared, strict=True)
        flat = [(torch.zeros_like(learning[n]) if g is None else g).reshape(-1) for g, n in pairs]
        each.append(torch.cat(flat).double().numpy())
    expected = naive_pcgrad(np.stack(each), generator_of(0, "pcgrad", 0))
    assert (
        np.abs(expected - sum(each)).max() > 1e-3 * np.abs(expected).max()
    )  # some are against others
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
    names = [name for name, grad in own.items() if grad is not None]
    whole = torch.autograd.grad(
        losses.sum() / planned.count, [learning[n] for n in names], allow_unused=True
    )
    for name, grad in zip(names, whole, strict=True):  # what is a task's own learns as ever
        if grad is not None:
            assert torch.allclose(own[name], grad, atol=1e-5 * float(grad.abs().max()) + 1e-8)


def test_rows_of_one_task_are_all_pairs_of_picture_and_map(built: Built) -> None:
    """Seven pictures, of which every third has no depth: each pair once an epoch, and no other map beside it."""
    trainer: Any = built("training.rows=one_task", "training.rows_per_step=4").trainer
    dataset = trainer.data.dataset("answer")
    assert [len(own) for own in dataset.lengths] == [7, 4, 7, 7]
    met = [tuple(p) for n in range(7) for row in trainer.data.mixture.step(n)[1] for p in row]
    assert len(met) == len(set(met)) == 25
    batch = dataset.at(0, 0).collate([[(1, 0)], [(3, 2)]])
    assert batch.present.tolist() == [[t == "depth" for t in TASKS], [t == "edges" for t in TASKS]]
    assert batch.owners.tolist() == [1, 3] and set(batch.maps) == {1, 3}
    assert dataset.where(1, 0).endswith("train.jsonl:2")  # the first picture has no depth
