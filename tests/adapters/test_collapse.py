"""For one task the adapter is an ordinary LoRA: (A, B'_t), exactly, and as PEFT computes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from mtl_lora_cli.adapters.layer import MultiTaskLinear

MakeLayer = Callable[..., MultiTaskLinear]


@pytest.mark.parametrize("transform", ["full", "diagonal", "bases"])
@pytest.mark.parametrize("gate", ["weights", "embedding"])
def test_the_collapsed_update_is_the_layers_effective_weight(
    make_layer: MakeLayer, transform: str, gate: str
) -> None:
    layer = make_layer(transform=transform, gate=gate)
    units = torch.eye(7, dtype=torch.float64)
    for task in range(4):
        with torch.no_grad(), layer.routing.assign(torch.full((7,), task)):
            effective = (layer(units) - layer.base_layer.bias).T
        down, up = layer.task_update(task)
        collapsed = layer.base_layer.weight + layer.config.scale(layer.rank) * up @ down
        torch.testing.assert_close(collapsed, effective, rtol=1e-12, atol=1e-12)


def test_the_collapsed_update_has_the_adapters_rank(make_layer: MakeLayer) -> None:
    layer = make_layer(rank=3)
    down, up = layer.task_update(2)
    assert (down.shape, up.shape) == ((3, 7), (5, 3))
    assert down.dtype == up.dtype == torch.float64


def test_float32_parameters_collapse_beyond_their_own_precision(make_layer: MakeLayer) -> None:
    layer = make_layer(dtype=torch.float32)
    exact = make_layer()
    for name in ("lora_A", "lora_B", "task_transform", "task_gate"):
        getattr(exact, name).data.copy_(getattr(layer, name))
    for one, two in zip(layer.task_update(1), exact.task_update(1), strict=True):
        # The gate is a float32 softmax; what follows it is not rounded again.
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_one_up_projection_and_no_transform_is_pefts_lora(make_layer: MakeLayer) -> None:
    from peft import LoraConfig, get_peft_model

    layer = make_layer(up_projections=1, tasks=2)
    layer.task_transform.data.copy_(torch.eye(3, dtype=torch.float64))
    model = nn.Sequential(nn.Linear(7, 5, dtype=torch.float64))
    model.load_state_dict({f"0.{k}": v for k, v in layer.base_layer.state_dict().items()})
    config = LoraConfig(r=3, lora_alpha=layer.config.alpha, target_modules=["0"])
    theirs = get_peft_model(model, config)
    lora = theirs.base_model.model[0]
    lora.lora_A["default"].weight.data = layer.lora_A[0].detach().clone()
    lora.lora_B["default"].weight.data = layer.lora_B[0].detach().clone()
    x = torch.randn(6, 7, dtype=torch.float64)
    with torch.no_grad(), layer.routing.assign(torch.tensor([0, 1, 1, 0, 0, 1])):
        torch.testing.assert_close(layer(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_every_task_is_a_peft_lora(make_layer: MakeLayer) -> None:
    from peft import LoraConfig, get_peft_model

    layer = make_layer()
    x = torch.randn(6, 7, dtype=torch.float64)
    for task in range(4):
        model = nn.Sequential(nn.Linear(7, 5, dtype=torch.float64))
        model.load_state_dict({f"0.{k}": v for k, v in layer.base_layer.state_dict().items()})
        config = LoraConfig(r=3, lora_alpha=layer.config.alpha, target_modules=["0"])
        theirs = get_peft_model(model, config)
        lora = theirs.base_model.model[0]
        down, up = layer.task_update(task)
        lora.lora_A["default"].weight.data, lora.lora_B["default"].weight.data = down, up
        with torch.no_grad(), layer.routing.assign(torch.full((6,), task)):
            torch.testing.assert_close(layer(x), theirs(x), rtol=1e-12, atol=1e-12)
