"""Only the tasks that are present cost anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mtl_lora_cli.adapters.layer import MultiTaskLinear

MakeLayer = Callable[..., MultiTaskLinear]


def flops(layer: MultiTaskLinear, ids: torch.Tensor) -> int:
    """Of a forward and a backward pass."""
    x = torch.randn(*ids.shape, 7, dtype=torch.float64, requires_grad=True)
    with FlopCounterMode(display=False) as counter, layer.routing.assign(ids):
        layer(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("transform", ["full", "diagonal", "bases"])
@pytest.mark.parametrize("gate", ["weights", "embedding"])
def test_a_thousand_tasks_cost_what_the_present_ones_cost(
    make_layer: MakeLayer, transform: str, gate: str
) -> None:
    few = make_layer(tasks=3, transform=transform, gate=gate)
    many = make_layer(tasks=1000, transform=transform, gate=gate)
    ids = torch.tensor([[0, 1, 2, 1, 0, 2, -1, 0]])
    assert flops(few, ids) == flops(many, ids)
    spread = torch.tensor([[17, 512, 999, 512, 17, 999, -1, 17]])
    assert flops(few, ids) == flops(many, spread)


def test_the_count_sees_the_tasks(make_layer: MakeLayer) -> None:
    layer = make_layer(tasks=4)
    one = flops(layer, torch.tensor([[2, 2, 2, 2]]))
    three = flops(layer, torch.tensor([[0, 1, 2, 2]]))
    base = flops(layer, torch.tensor([[-1, -1, -1, -1]]))
    assert base < one < three


def test_no_intermediate_grows_with_the_tasks_times_the_positions(make_layer: MakeLayer) -> None:
    layer = make_layer(tasks=1000)
    ids = torch.tensor([5, 900]).repeat(200)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    x = torch.randn(400, 7, dtype=torch.float64, requires_grad=True)
    with (
        layer.routing.assign(ids),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        layer(x)
    widest = max(7, layer.config.up_projections * layer.config.rank)  # x, or u = M z
    assert max(kept) <= 400 * widest
