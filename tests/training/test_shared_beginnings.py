"""Whole runs with `training.share_beginnings`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_lora_cli.adapters.files import read_tensors
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.machine.processes import Place, Processes
from mtl_lora_cli.memory.situation import densest
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.drawn import Draw
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import Prepared, _require_shared
from mtl_lora_cli.training.run import resume, start

from ..engine.double import tiny
from ..engine.test_families import CASES as FAMILIES
from .conftest import together
from .sharing_worker import CASES
from .sharing_worker import ON as SHARING

pytestmark = pytest.mark.slow

DELTA, NEAR = (
    next(changes for kind, what, changes in FAMILIES if (kind, what) == wanted)
    for wanted in (("qwen3_next", "delta nets"), ("phi3", "longrope"))
)
ON = [
    "training.share_beginnings=true",
    "adapter.dropout=0",
    "training.row_length=512",
    "training.rows_per_step=2",
]


@pytest.fixture(scope="module")
def shared(recipe_file: Path) -> Prepared:
    return prepare(load_recipe(recipe_file, ON))


def losses(run: RunFolder) -> list[float]:
    return [event["loss"] for event in run.events() if event["event"] == "step"]


def test_a_step_learns_what_its_examples_learn_apart(shared: Prepared) -> None:
    """A row holds more than its length of examples; every one counts once, in its task's place."""
    data, settings = shared.data, shared.recipe.training
    host, adapter = shared.build()
    trained = adapter.trained()

    def gradients(drawn: Draw) -> tuple[Tensor, list[Tensor | None]]:
        step = drawn(0)
        total = torch.zeros(())
        for batch, weights in zip(step.batches, step.weights, strict=True):
            with host.routed(batch):
                total = total + (host.losses(batch) * weights).sum() / step.count
        return total.detach(), list(torch.autograd.grad(total, list(trained.values())))

    rows = data.mixture.step(0)[1]
    taken = [sum(int(data.mixture.lengths[t][n]) for t, n in row) for row in rows]
    assert max(taken) > settings.row_length
    assert all(b.input_ids.numel() <= settings.row_length for b in Draw(data, settings)(0).batches)
    with_trees = gradients(Draw(data, settings))
    apart = Draw(data, settings)
    apart._dataset = replace(data, mixture=replace(data.mixture, beginnings=())).dataset("answer")
    ours, theirs = with_trees, gradients(apart)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    for one, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_rows_are_the_same_for_any_number_of_processes(shared: Prepared) -> None:
    settings = shared.recipe.training
    whole = Draw(shared.data, settings)
    parts = [Draw(shared.data, settings, Processes(Place(rank, 2, rank))) for rank in range(2)]
    for number in range(2):
        one, (two, three) = whole(number), (part(number) for part in parts)
        assert one.rows == two.rows == three.rows and one.count == two.count
        assert sorted(one.places) == sorted([*two.places, *three.places])


def test_a_stopped_run_goes_on_and_ends_the_same(recipe_file: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe_file, [*ON, "training.max_steps=2", "training.checkpoint_every=1"])
    run = start(prepare(loaded), tmp_path / "run")
    assert load_recipe(run.recipe).recipe.training.share_beginnings
    whole, before = read_tensors(run.adapter), losses(run)
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "step-000002")
    with pytest.raises(UsageError, match=r"training\.share_beginnings: True → False"):
        resume(run, None, ["training.share_beginnings=false"])
    again = read_tensors(resume(run, None, []).adapter)
    assert losses(run) == before
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_run_begun_without_goes_on_without(prepared: Prepared) -> None:
    assert not prepared.data.shares and not prepared.data.mixture.beginnings
    assert all(
        batch.segments.reach is None
        for batch in Draw(prepared.data, prepared.recipe.training)(0).batches
    )


def test_memory_counts_what_shared_rows_ask(shared: Prepared, prepared: Prepared) -> None:
    length = shared.recipe.training.row_length
    asked = [densest(one.data, length, "all") for one in (shared, prepared)]
    assert asked[0] > length >= asked[1]
    situations = [one.situation() for one in (shared, prepared)]
    loads = [
        one.changed(training=one.recipe.training.model_copy(update={"loss_on": "all"})).step()[2]
        for one in situations
        if one
    ]
    assert loads[0].asked == asked[0] and loads[0].trees and loads[0].segment == length
    assert loads[1].asked <= loads[1].positions and not loads[1].trees


@pytest.mark.parametrize(
    "changes, why",
    [
        (["adapter.dropout=0.1"], "does not go with adapter.dropout: .* received 0.1; use 0"),
        (["training.shuffled_tasks=true"], "does not go with training.shuffled_tasks"),
        (["engine=plain"], None),
    ],
)
def test_what_would_not_be_exact_is_refused(
    recipe_file: Path, changes: list[str], why: str | None
) -> None:
    if why is None:  # transformers' own layers take packed rows and trees, too
        prepare(load_recipe(recipe_file, [*ON, *changes])).build()
        return
    with pytest.raises(MtlLoraError, match=f"share_beginnings {why}"):
        load_recipe(recipe_file, [*ON, *changes])


@pytest.mark.parametrize(
    "kind, changes, why",
    [("qwen3_next", DELTA, "a state from token to token"), ("phi3", NEAR, "beyond 20 positions")],
)
def test_layers_that_know_no_trees_refuse_them(
    kind: str, changes: dict[str, Any], why: str
) -> None:
    packed = PackedModel(tiny(kind, **changes))
    with pytest.raises(UsageError, match=f"training.share_beginnings: .*{why}"):
        _require_shared(packed, 90)
    if packed.together is not None:
        _require_shared(packed, packed.together)


@pytest.mark.long
def test_processes_and_stages_learn_the_same(recipe_file: Path, tmp_path: Path) -> None:
    """Two processes, ZeRO 0, 2 and 3 and NF4; and what two have begun one goes on with."""
    recipe = tmp_path / "recipe.yaml"
    shutil.copy(recipe_file, recipe)
    small = {"stage": "auto", "stage3_param_persistence_threshold": 0}
    zero = {"train_batch_size": "auto", "zero_optimization": small}
    (tmp_path / "small.json").write_text(json.dumps(zero))
    worker = str(Path(__file__).with_name("sharing_worker.py"))
    processes = together(worker, str(recipe), str(tmp_path))
    said = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    alone = {
        name: start(prepare(load_recipe(recipe, [*SHARING, *more])), tmp_path / f"alone-{name}")
        for name, more in (("alike", []), ("nf4", ["quantization=nf4"]))
    }
    for name in CASES:
        right = losses(alone[name.partition("-")[0]])
        assert losses(RunFolder(tmp_path / name)) == pytest.approx(right, rel=1e-5)
    begun = RunFolder(tmp_path / "alike-0")
    shutil.rmtree(begun.adapter)
    shutil.rmtree(begun.checkpoints / "step-000004")
    assert losses(resume(begun, None, [])) == pytest.approx(losses(alone["alike"]), rel=1e-5)
