"""The cosine between tasks' gradients is what one backward pass a task would give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_lora_cli.adapters.methods import METHODS, configure
from mtl_lora_cli.data.collate import training_batch
from mtl_lora_cli.recipe.training import Diagnose
from mtl_lora_cli.training.diagnose import cosines
from mtl_lora_cli.training.gradients import TaskGradients, shared_parameters

from ..often import often


def naive(run: Any, step: int) -> tuple[list[str], list[Tensor]]:
    """Example by example: the gradient of each task's mean loss in one step's rows."""
    trainer = run.trainer
    trainer.host.eval()
    found: dict[int, list[tuple[int, int]]] = {}
    for row in trainer.data.mixture.step(step - 1)[1]:
        for place in row:
            found.setdefault(place[0], []).append(place)
    names, gradients = [], []
    for task in sorted(found):
        trainer.host.zero_grad()
        batches = [
            training_batch([[place]], trainer.data.splits, loss_on="answer")
            for place in found[task]
        ]
        count = sum(len(batch.targets) for batch in batches)
        for batch in batches:
            with trainer.host.routed(batch):
                (-trainer.host(batch).sum() / count).backward()
        shared = [
            tensor.grad.reshape(-1)
            for name, tensor in trainer.adapter.tensors().items()
            if name.rpartition(".")[2]
            in ("lora_A", "lora_B", "gate_projection", "scale", "magnitude")
        ]
        names.append(trainer.data.tasks[task].name)
        gradients.append(torch.cat(shared).double())
    return names, gradients


@pytest.mark.parametrize(
    "kind",
    often(
        [
            {"gate": "weights"},
            {"gate": "embedding"},
            *({"method": method} for method in METHODS if method != "mtl-lora"),
        ],
        [{"gate": "embedding"}, {"method": "mtlora"}, {"method": "dora"}, {"method": "lora"}],
    ),
    ids=lambda kind: next(iter(kind.values())),
)
def test_it_is_the_naive_cosine(small: Callable[..., Any], kind: dict[str, Any]) -> None:
    config = configure(rank=8, dropout=0.0 if kind.get("method") == "pissa" else 0.1, **kind)
    run = small(steps=4, adapter=config, diagnose=Diagnose(every=4), checkpoint_every=1).train()
    (event,) = [event for event in run.events if event["event"] == "gradients"]
    assert event["step"] == 4
    before = small(adapter=config)
    before.trainer.resume(run.run.checkpoints / "step-000003")
    names, gradients = naive(before, 4)
    assert event["tasks"] == names
    assert len(names) > 1
    for row, one in enumerate(gradients):
        assert event["norm"][row] == pytest.approx(float(one.norm()), rel=1e-4)
        for column, two in enumerate(gradients):
            expected = float(one @ two / (one.norm() * two.norm()))
            assert event["cosine"][row][column] == pytest.approx(expected, abs=1e-5)


def test_it_is_symmetric_with_ones_on_the_diagonal(small: Callable[..., Any]) -> None:
    run = small(steps=4, diagnose=Diagnose(every=2)).train()
    events = [event for event in run.events if event["event"] == "gradients"]
    assert [event["step"] for event in events] == [2, 4]
    for event in events:
        cosine = torch.tensor(event["cosine"], dtype=torch.float64)
        assert torch.equal(cosine, cosine.T)
        assert torch.equal(cosine.diagonal(), torch.ones(len(event["tasks"]), dtype=torch.float64))
        assert cosine.abs().max() <= 1.0


def test_the_tasks_gradients_add_up_to_the_steps(small: Callable[..., Any]) -> None:
    """Σ_t (S_t / S) g_t is the gradient of the step's loss: nothing is counted twice or left out."""
    run = small(adapter=configure(rank=4))
    trainer = run.trainer
    dataset = trainer.data.dataset(trainer.settings.loss_on)
    gradients = TaskGradients(trainer.host, trainer.adapter, dataset, 128)
    prepared = trainer.stepper.prepare(0)
    drawn = prepared.planned
    places: dict[int, list[tuple[int, int]]] = {}
    for row in drawn.rows:
        for place in row:
            places.setdefault(place[0], []).append(place)
    total = sum(
        gradients.of(own, task)[0] * int(drawn.supervised[task]) for task, own in places.items()
    ) / int(drawn.supervised.sum())
    trainer.stepper.accumulate(prepared)
    shared = shared_parameters(trainer.adapter)
    expected = torch.cat([tensor.grad.reshape(-1) for tensor in shared.values()])
    assert torch.allclose(total, expected, rtol=0, atol=1e-6 * float(expected.abs().max()) + 1e-8)


def test_parameters_with_a_task_axis_are_not_shared(small: Callable[..., Any]) -> None:
    roles = {
        gate: {
            name.rpartition(".")[2]
            for name in shared_parameters(
                small(adapter=configure(rank=4, gate=gate)).trainer.adapter
            )
        }
        for gate in ("weights", "embedding")
    }
    assert roles["weights"] == {"lora_A", "lora_B"}
    assert roles["embedding"] == {"lora_A", "lora_B", "gate_projection"}


def test_cosines_against_a_loop_in_any_number_of_pieces() -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 2**20 + 3)
    rows[1] = 0.0
    cosine, norm = cosines(rows)
    assert norm[1] == 0
    assert cosine[1].isnan().all()
    wide = rows.double()
    expected = float(wide[0] @ wide[2] / (wide[0].norm() * wide[2].norm()))
    assert float(cosine[0, 2]) == pytest.approx(expected, abs=1e-12)
