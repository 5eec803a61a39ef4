"""What one task's parameters do to the outputs of another: nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.layer import MultiTaskLinear

MakeLayer = Callable[..., MultiTaskLinear]

IDS = torch.tensor([[0, 1, 1, -1, 2, 0, 3, -1, 1, 2]])


def output(layer: MultiTaskLinear, x: Tensor) -> Tensor:
    with torch.no_grad(), layer.routing.assign(IDS):
        return layer(x)


def parts_of(layer: MultiTaskLinear) -> list[nn.Parameter]:
    """What belongs to single tasks, the task first."""
    gate = layer._shared["task_embedding"] if layer.config.gate == "embedding" else layer.task_gate
    assert gate is not None
    return [layer.task_transform, gate]


@pytest.mark.parametrize("value", [17.0, float("nan"), float("inf")])
@pytest.mark.parametrize("transform", ["full", "diagonal", "bases"])
@pytest.mark.parametrize("gate", ["weights", "embedding"])
def test_a_tasks_parameters_reach_no_other_task(
    make_layer: MakeLayer, transform: str, gate: str, value: float
) -> None:
    layer = make_layer(transform=transform, gate=gate)
    x = torch.randn(*IDS.shape, 7, dtype=torch.float64)
    before = output(layer, x)
    for part in parts_of(layer):
        part.data[1, ..., 0] = value
    after = output(layer, x)
    assert torch.equal(before[IDS != 1], after[IDS != 1])
    assert not torch.equal(before[IDS == 1], after[IDS == 1])


def test_a_poisoned_task_leaves_the_gradients_of_the_others_parts_alone(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer()
    x = torch.randn(*IDS.shape, 7, dtype=torch.float64)

    def gradients() -> list[Tensor]:
        layer.zero_grad()
        with layer.routing.assign(IDS):
            layer(x)[IDS != 1].sum().backward()
        return [layer.task_transform.grad.clone(), layer.task_gate.grad.clone()]  # type: ignore[union-attr]

    before = gradients()
    for part in parts_of(layer):
        part.data[1] = float("nan")
    others = [0, 2, 3]
    for one, two in zip(before, gradients(), strict=True):
        assert torch.equal(one[others], two[others])


def test_without_a_task_the_output_is_the_base_exactly(make_layer: MakeLayer) -> None:
    layer = make_layer()
    x = torch.randn(*IDS.shape, 7, dtype=torch.float64)
    base = layer.base_layer(x)
    mixed = output(layer, x)
    assert torch.equal(mixed[IDS == -1], base[IDS == -1])
    with layer.routing.assign(torch.full_like(IDS, -1)):
        assert torch.equal(layer(x), base)


def test_without_a_task_not_even_poisoned_tasks_show(make_layer: MakeLayer) -> None:
    layer = make_layer()
    for part in parts_of(layer):
        part.data[:] = float("nan")
    x = torch.randn(*IDS.shape, 7, dtype=torch.float64)
    assert torch.equal(output(layer, x)[IDS == -1], layer.base_layer(x)[IDS == -1])


def test_the_order_of_tasks_in_a_row_does_not_matter(make_layer: MakeLayer) -> None:
    layer = make_layer()
    x = torch.randn(*IDS.shape, 7, dtype=torch.float64)
    order = torch.randperm(IDS.shape[1])
    with torch.no_grad(), layer.routing.assign(IDS[:, order]):
        shuffled = layer(x[:, order])
    torch.testing.assert_close(shuffled, output(layer, x)[:, order], rtol=1e-13, atol=1e-13)
