"""Streams of tasks through one layer, against the formula that torch differentiates by itself, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters import streams
from mtl_lora_cli.adapters.layer import MultiTaskLinear
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.adapters.routing import Routing

RANK, OWN, ROWS = 3, 2, 12


def layer_of(dropout: float = 0.0) -> MultiTaskLinear:
    torch.manual_seed(0)
    config = configure(
        method="mtlora", rank=RANK, alpha=6.0, task_rank=OWN, dropout=dropout, target_modules=["x"],
        streams="stages",
    )  # fmt: skip
    layer = MultiTaskLinear(nn.Linear(7, 5).double(), config, Routing(3, shared=True))
    for name in ("lora_B", "task_lora_B"):
        getattr(layer, name).data.normal_()
    return layer


def by_formula(layer: MultiTaskLinear, x: Tensor, kept: Tensor, task: int | None) -> Tensor:
    y = layer.base_layer(x) + 6.0 / RANK * kept @ layer.lora_A[0].T @ layer.lora_B[0].T
    if task is None:
        return y
    return y + 6.0 / OWN * kept @ layer.task_lora_A[task].T @ layer.task_lora_B[task].T


@pytest.mark.parametrize("ids", [[0, 2, 3], [0, 1, 2], [3], [1]])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_values_and_gradients_are_the_formula_s(
    monkeypatch: pytest.MonkeyPatch, ids: list[int], dropout: float
) -> None:
    """Number 3 is the stream of what all share; a piece is cut into parts of two positions."""
    monkeypatch.setattr(streams, "_PART", 2)
    layer = layer_of(dropout)
    x = torch.randn(len(ids) * ROWS, 7, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    with layer.routing.assign(torch.tensor(ids).repeat_interleave(ROWS), windows=True):
        y = layer(x)
    torch.manual_seed(1)
    mask = torch.rand(x.shape, dtype=torch.float32) >= dropout
    kept = x * mask / (1 - dropout)
    pieces = zip(ids, x.split(ROWS), kept.split(ROWS), strict=True)
    expected = torch.cat(
        [by_formula(layer, a, b, None if task == 3 else task) for task, a, b in pieces]
    )
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    learned = [x, *(p for p in layer.parameters() if p.requires_grad)]
    upstream = torch.randn_like(y)
    mine = torch.autograd.grad(y, learned, upstream)
    theirs = torch.autograd.grad(expected, learned, upstream, materialize_grads=True)
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-11)
