"""Layers with every parameter set at random, and the formula written as plainly as it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.layer import MultiTaskLinear
from mtl_lora_cli.adapters.methods import DEFAULT, configure, reads
from mtl_lora_cli.adapters.methods.base import Settings
from mtl_lora_cli.adapters.routing import Routing

MakeLayer = Callable[..., MultiTaskLinear]
Naive = Callable[..., Tensor]


def _named(layer: MultiTaskLinear) -> dict[str, nn.Parameter]:
    """The trained tensors of one layer, the model's task embedding among them."""
    return {role: getattr(layer, role) for role in layer.roles} | layer._shared


def _make_layer(
    *,
    tasks: int = 4,
    base: nn.Linear | None = None,
    bias: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **config: Any,
) -> MultiTaskLinear:
    torch.manual_seed(seed)
    own = {"temperature": 0.7} if reads(config.get("method", DEFAULT), "temperature") else {}
    kinds = configure(**{"rank": 3, "alpha": 5.0, **own, **config})
    base = base or nn.Linear(7, 5, bias=bias, dtype=dtype)
    roles = kinds.roles_of_model(tasks)
    shared = {role.name: nn.Parameter(torch.randn(*role.shape, dtype=dtype)) for role in roles}
    layer = MultiTaskLinear(base, kinds, Routing(tasks), shared)
    with torch.no_grad():  # the start hides most of the formula: B is 0 and Λ the identity
        for parameter in _named(layer).values():
            parameter.copy_(torch.randn_like(parameter))
    return layer


def _naive(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: Mapping[str, Tensor],
    config: Settings,
    mask: Tensor | None = None,
) -> Tensor:
    """y = W x + b + (alpha / r) Σ_i g_{t,i} B_i Λ_t A x, a position at a time: x [N, in], ids [N]."""
    rows = []
    for i, task in enumerate(ids.tolist()):
        y = weight @ x[i]
        if bias is not None:
            y = y + bias
        if task >= 0:
            if config.gate == "weights":
                w = p["task_gate"][task]
            else:
                w = p["gate_projection"] @ p["task_embedding"][task]
            raw = [torch.exp(value / config.temperature) for value in w]
            transform = p["task_transform"][task]
            if config.transform == "diagonal":
                transform = torch.diag(transform)
            elif config.transform == "bases":
                weighted = zip(transform, p["transform_basis"], strict=True)
                transform = torch.eye(config.rank, dtype=x.dtype) + sum(c * S for c, S in weighted)
            dropped = x[i] if mask is None else x[i] * mask[i]
            z = transform @ (p["lora_A"][0] @ dropped)
            for up, value in zip(p["lora_B"], raw, strict=True):
                y = y + (config.alpha / config.rank) * (value / sum(raw)) * (up @ z)
        rows.append(y)
    return torch.stack(rows)


@pytest.fixture(scope="session")
def make_layer() -> MakeLayer:
    """Builds a `MultiTaskLinear` whose trained tensors are all random normal."""
    return _make_layer


@pytest.fixture(scope="session")
def trained() -> Callable[[MultiTaskLinear], dict[str, nn.Parameter]]:
    """Names the trained tensors of a layer."""
    return _named


@pytest.fixture(scope="session")
def naive() -> Naive:
    """The formula, a position at a time."""
    return _naive
