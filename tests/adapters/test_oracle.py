"""The layer against the formula written out a position at a time, forward and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mtl_lora_cli.adapters.layer import MultiTaskLinear

MakeLayer = Callable[..., MultiTaskLinear]
Naive = Callable[..., Tensor]
Trained = Callable[[MultiTaskLinear], dict[str, nn.Parameter]]

IDS = torch.tensor([[2, 0, -1, 2, 3, 3], [0, -1, 0, 2, 2, 0]])  # task 1 is absent
CLOSE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def compare(
    layer: MultiTaskLinear,
    trained: Trained,
    naive: Naive,
    ids: Tensor,
    draw: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Outputs and the gradients of a random weighting of them, for x and everything trained."""
    parameters = trained(layer)
    x = torch.randn(*ids.shape, 7, dtype=torch.float64, requires_grad=True)
    weighting = torch.randn(*ids.shape, 5, dtype=torch.float64)
    torch.manual_seed(11)
    with layer.routing.assign(ids):
        y = layer(x)
        (y * weighting).sum().backward()
    theirs = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    flat = x.detach().reshape(-1, 7).clone().requires_grad_()
    bias = layer.base_layer.bias
    expected = naive(
        flat,
        ids.reshape(-1),
        layer.base_layer.weight.detach(),
        None if bias is None else bias.detach(),
        theirs,
        layer.config,
        None if draw is None else draw(x.detach()).reshape(-1, 7),
    )
    (expected * weighting.reshape(-1, 5)).sum().backward()

    torch.testing.assert_close(y.reshape(-1, 5), expected, **CLOSE)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.reshape(-1, 7), flat.grad, **CLOSE)
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            parameter.grad,
            theirs[name].grad,
            msg=lambda text, name=name: f"{name}: {text}",
            **CLOSE,
        )


@pytest.mark.parametrize("transform", ["full", "diagonal", "bases"])
@pytest.mark.parametrize("gate", ["weights", "embedding"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_equals_the_formula(
    make_layer: MakeLayer, trained: Trained, naive: Naive, transform: str, gate: str, n: int
) -> None:
    layer = make_layer(transform=transform, gate=gate, up_projections=n)
    compare(layer, trained, naive, IDS)


@pytest.mark.parametrize(
    "ids", [[[1, 1, 1]], [[-1, 1, -1]], [[0, 1, 2]], [[-1, 3, 0]]], ids=lambda ids: str(ids[0])
)
def test_equals_the_formula_for_any_mixture(
    make_layer: MakeLayer, trained: Trained, naive: Naive, ids: list[list[int]]
) -> None:
    compare(make_layer(), trained, naive, torch.tensor(ids))


def test_equals_the_formula_without_a_bias(
    make_layer: MakeLayer, trained: Trained, naive: Naive
) -> None:
    compare(make_layer(bias=False), trained, naive, IDS)


@pytest.mark.parametrize("gate", ["weights", "embedding"])
def test_equals_the_formula_with_dropout(
    make_layer: MakeLayer, trained: Trained, naive: Naive, gate: str
) -> None:
    # A probe whose update hands x through shows which features the same seed drops.
    identity = nn.Linear(7, 7, bias=False, dtype=torch.float64)
    probe = make_layer(base=identity, rank=7, alpha=7.0, up_projections=1, tasks=1, dropout=0.4)
    with torch.no_grad():
        probe.base_layer.weight.zero_()
        for matrix in (probe.lora_A, probe.lora_B, probe.task_transform):
            matrix.copy_(torch.eye(7, dtype=torch.float64))

    def mask(x: Tensor) -> Tensor:
        torch.manual_seed(11)
        with torch.no_grad(), probe.routing.assign(torch.zeros(x.shape[:-1], dtype=torch.long)):
            found = probe(torch.ones_like(x))
        kept = found != 0
        torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / 0.6))
        assert 0.3 < kept.double().mean() < 0.9
        return found

    compare(make_layer(dropout=0.4, gate=gate), trained, naive, IDS, mask)


def test_dropout_is_off_in_evaluation(
    make_layer: MakeLayer, trained: Trained, naive: Naive
) -> None:
    layer = make_layer(dropout=0.5)
    layer.eval()
    compare(layer, trained, naive, IDS)


@pytest.mark.parametrize("transform", ["full", "diagonal", "bases"])
@pytest.mark.parametrize("gate", ["weights", "embedding"])
def test_gradients_equal_finite_differences(
    make_layer: MakeLayer, trained: Trained, transform: str, gate: str
) -> None:
    layer = make_layer(transform=transform, gate=gate, up_projections=2, rank=2)
    parameters = trained(layer)

    def output(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(parameters, values, strict=True))
        if "task_embedding" in given:
            layer._shared = {"task_embedding": given.pop("task_embedding")}  # type: ignore[dict-item]
        with layer.routing.assign(IDS):
            return functional_call(layer, given, (x,))

    x = torch.randn(*IDS.shape, 7, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(output, (x, *values))


def test_the_frozen_layer_gets_no_gradient(make_layer: MakeLayer) -> None:
    layer = make_layer()
    with layer.routing.assign(IDS):
        layer(torch.randn(*IDS.shape, 7, dtype=torch.float64)).sum().backward()
    assert not layer.base_layer.weight.requires_grad
    assert layer.base_layer.weight.grad is None
    assert layer.base_layer.bias.grad is None


def test_an_absent_task_gets_a_zero_gradient(make_layer: MakeLayer) -> None:
    layer = make_layer()
    with layer.routing.assign(IDS):
        layer(torch.randn(*IDS.shape, 7, dtype=torch.float64)).square().sum().backward()
    for own in (layer.task_transform, layer.task_gate):
        assert own.grad is not None
        assert not own.grad[1].any()
        assert all(own.grad[task].any() for task in (0, 2, 3))


def test_a_fresh_layer_is_the_base(make_layer: MakeLayer) -> None:
    fresh = make_layer()
    layer = MultiTaskLinear(fresh.base_layer, fresh.config, fresh.routing)
    x = torch.randn(*IDS.shape, 7, dtype=torch.float64)
    with layer.routing.assign(IDS):
        assert torch.equal(layer(x), layer.base_layer(x))


def test_bfloat16_activations_stay_near_the_formula(make_layer: MakeLayer) -> None:
    layer = make_layer(base=nn.Linear(7, 5, dtype=torch.bfloat16))
    exact = make_layer(base=nn.Linear(7, 5, dtype=torch.float64))
    exact.base_layer.weight.data.copy_(layer.base_layer.weight)
    exact.base_layer.bias.data.copy_(layer.base_layer.bias)
    for name in ("lora_A", "lora_B", "task_transform", "task_gate"):
        assert getattr(layer, name).dtype == torch.float32
        getattr(exact, name).data.copy_(getattr(layer, name))
    x = torch.randn(*IDS.shape, 7, dtype=torch.bfloat16)
    with layer.routing.assign(IDS), exact.routing.assign(IDS):
        rounded, expected = layer(x), exact(x.double())
    assert rounded.dtype == torch.bfloat16
    error = (rounded.double() - expected).norm() / expected.norm()
    assert error < 0.02
