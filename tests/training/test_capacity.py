"""One graph for any row: what a pass is filled up with changes no loss, no gradient, and nothing of an absent task."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter, inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.bench.yardstick import Yardstick
from mtl_lora_cli.machine.processes import ALONE, Place, Processes
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.training.capacity import Fullest, PassSizes, padded, slot_table, tasks_in
from mtl_lora_cli.training.drawn import Draw, sizes_of
from mtl_lora_cli.training.passes import _NAMES, routed, slots_in
from mtl_lora_cli.training.prepared import Prepared
from mtl_lora_cli.training.update import ParameterGroup, make_optimizer

from ..engine.double import VOCABULARY, in_double, packed_row, tiny

TASKS = 70
SIZES = PassSizes(128, TASKS, Fullest(asked=40, examples=5, tasks=4), rows=(1,))
CONFIGS: list[dict[str, Any]] = [
    {},
    {"gate": "embedding", "transform": "bases"},
    {"method": "mtlora"},
    {"method": "moelora", "up_projections": 3},
    {"method": "lora"},
]


def built(**config: Any) -> tuple[PackedModel, Adapter]:
    """In float64, with many tasks that are far from each other."""
    model = tiny("llama", num_hidden_layers=2)
    settings = configure(rank=3, target_modules=("q_proj", "v_proj", "o_proj"), **config)
    adapter = inject(model, settings, [f"task{number}" for number in range(TASKS)])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.data = tensor.data.double()
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return PackedModel(model, adapter, engine="fused").train(), adapter


def row(tasks: list[int], seed: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = [17 + 2 * number for number in range(len(tasks))]
    tokens = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]
    return packed_row(list(zip(tokens, tasks, strict=True)))


def learn(packed: PackedModel, adapter: Adapter, batch: PackedBatch, *, fill: bool) -> Tensor:
    """The losses; gradients stand at the parameters."""
    weights = torch.linspace(1, 2, len(batch.targets), dtype=torch.float64)
    slots, count = None, len(batch.targets)
    if fill:
        capacity = SIZES.capacity(batch)
        batch = padded(batch, capacity)
        weights = torch.cat([weights, weights.new_zeros(capacity.questions - count)])
        assert capacity.slots == 16
        assert capacity.positions == batch.input_ids.numel() == 128
        names = _NAMES[_NAMES.index("present") :]
        found = routed(batch, TASKS, capacity)
        slots = slots_in(dict(zip(names, found, strict=True)), all_tasks=False)
    with in_double(), packed.routed(batch):
        losses = -packed(batch, slots=slots)
        (losses * weights).sum().backward()
    return losses.detach()[:count]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_slots_that_nobody_takes_change_nothing(config: dict[str, Any]) -> None:
    """Two updates of different tasks: also of those that were there before, and of those that never are."""
    plain, plain_adapter = built(**config)
    filled, filled_adapter = copy.deepcopy((plain, plain_adapter))
    start = {name: one.detach().clone() for name, one in plain_adapter.tensors().items()}
    optimizers = [
        make_optimizer(
            [ParameterGroup(list(one.trained().values()), 1e-2, weight_decay=0.0)], graphed=False
        )
        for one in (plain_adapter, filled_adapter)
    ]
    for number, tasks in enumerate(([3, 69, -1, 41, 3], [5, 41])):
        batch = row(tasks, number)
        expected = learn(plain, plain_adapter, batch, fill=False)
        found = learn(filled, filled_adapter, batch, fill=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        absent = [task for task in range(TASKS) if task not in tasks]
        for name, tensor in plain_adapter.tensors().items():
            ours = filled_adapter.tensors()[name].grad
            if tensor.grad is None or ours is None:
                assert tensor.grad is None or not tensor.grad.any()
                assert ours is None or not ours.any()
                continue
            torch.testing.assert_close(ours, tensor.grad, rtol=0, atol=1e-9)
            if plain_adapter.role(name).per_task:
                assert not ours[absent].any()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    never = [task for task in range(TASKS) if task not in (3, 5, 41, 69)]
    for name, tensor in plain_adapter.tensors().items():
        ours = filled_adapter.tensors()[name].detach()
        torch.testing.assert_close(ours, tensor.detach(), rtol=0, atol=1e-8)
        if plain_adapter.role(name).per_task:
            assert torch.equal(ours[never], start[name][never])


def test_which_task_stands_in_which_slot() -> None:
    ids = torch.tensor([7, 7, -1, 2, 7, 5])
    present, places = slot_table(ids, tasks=9, slots=5)
    assert present.tolist() == [2, 5, 7, 7, 7]
    assert places[ids].tolist() == [2, 2, -1, 0, 2, 1]
    present, places = slot_table(ids, tasks=9, slots=0)
    assert present.tolist() == list(range(9))
    assert torch.equal(places[ids].long(), ids)
    present, places = slot_table(torch.tensor([-1, -1]), tasks=9, slots=3)
    assert present.tolist() == [0, 0, 0]
    assert (places == -1).all()
    with pytest.raises(ValueError, match="3 tasks do not fit 2 slots"):
        slot_table(ids, tasks=9, slots=2)


@pytest.mark.parametrize("tasks", [8, 1000])
def test_one_capacity_for_every_row(tasks: int) -> None:
    """Known before the first of them, and no larger than the fullest one asks for."""
    length = 2048
    yardstick = Yardstick.build(vocabulary=50, tasks=tasks, seed=0)
    rows = yardstick.rows(length, 0)
    fullest = yardstick.fullest(length)
    splits = yardstick.splits
    each = [[len(splits[task].learned(number)) for task, number in row] for row in rows]
    assert fullest.asked == max(map(sum, each))
    assert fullest.examples == max(map(len, rows))
    assert fullest.tasks == max(len(Counter(task for task, _ in row)) for row in rows)
    sizes = PassSizes.of_steps(length, tasks, fullest, mine=6, rows_per_pass=4)
    assert sizes.rows == (4, 2)
    several = yardstick.steps(20, row_length=length, rows_per_step=6, rows_per_pass=4, seed=0)
    found = Counter(sizes.capacity(batch) for step in several for batch in step.batches)
    assert sorted(found.values()) == [20, 20]
    for capacity in found:
        assert capacity.slots == 0 or 60 < capacity.slots < 150
    (one,) = yardstick.steps(1, row_length=length, rows_per_step=1, rows_per_pass=1, seed=0)
    assert sizes.capacity(one.batches[0]).positions == 2 * length, "filled up to the next"


def test_a_fuller_row_has_a_graph_of_its_own() -> None:
    """As later windows of a stream may hold; the sizes follow from the row alone."""
    batch = row([1, 2, 3, 4, 1], 0)
    usual, small = SIZES.capacity(batch), PassSizes(128, TASKS, Fullest(1, 1, 1), (1,))
    assert small.capacity(batch) == usual
    many = row(list(range(30)), 0)
    assert replace(SIZES, row_length=2048).capacity(many).slots == 32
    assert PassSizes(2048, 30).capacity(many).slots == 0, "all tasks' matrices are as few"
    assert len(tasks_in(many.task_ids.view(-1))) == 30


def test_a_run_knows_its_passes(prepared: Prepared) -> None:
    """All passes of its steps are of one size, and each process of two knows its own."""
    training = prepared.recipe.training
    sizes = sizes_of(prepared.data, training, ALONE, captured=True)
    draw = Draw(prepared.data, training)
    found = [draw(number).batches for number in range(prepared.total_steps)]
    assert len({sizes.capacity(batch) for batches in found for batch in batches}) == 1
    assert sizes_of(prepared.data, training, ALONE, captured=False).fullest is None
    three = training.model_copy(update={"rows_per_step": 3, "rows_per_pass": 4})
    each = [Processes(Place(rank, 2)) for rank in range(2)]
    assert [sizes_of(prepared.data, three, one, captured=False).rows for one in each] == [
        (2,),
        (1,),
    ]
