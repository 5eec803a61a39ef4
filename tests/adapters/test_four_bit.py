"""On bitsandbytes' 4-bit linear: the same mathematics over the dequantised weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.frozen import multiply_ourselves
from mtl_lora_cli.adapters.layer import MultiTaskLinear

MakeLayer = Callable[..., MultiTaskLinear]
Naive = Callable[..., Tensor]
Trained = Callable[[MultiTaskLinear], dict[str, nn.Parameter]]

bnb = pytest.importorskip("bitsandbytes")
IDS = torch.tensor([2, 0, -1, 3, 3, 0])


def four_bit(bias: bool = True, double: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    layer = bnb.nn.Linear4bit(
        64, 48, bias=bias, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=double
    )
    return layer.to("cpu")  # moving it is what quantises it


def dequantised(base: nn.Linear) -> Tensor:
    return bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).float()


def test_the_base_really_is_four_bit() -> None:
    base = four_bit()
    assert base.weight.dtype == torch.uint8
    assert base.weight.numel() == 64 * 48 // 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double", [True, False])
def test_equals_the_formula_over_the_dequantised_weight(
    make_layer: MakeLayer, naive: Naive, trained: Trained, bias: bool, double: bool
) -> None:
    base = four_bit(bias, double)
    layer = make_layer(base=base, dtype=torch.float32)
    weight = dequantised(base).double()
    x = torch.randn(6, 64, requires_grad=True)
    weighting = torch.randn(6, 48)
    with layer.routing.assign(IDS):
        y = layer(x)
        (y * weighting).sum().backward()
    theirs = {n: p.detach().double().requires_grad_() for n, p in trained(layer).items()}
    same = x.detach().double().requires_grad_()
    offset = base.bias.detach().double() if bias else None
    expected = naive(same, IDS, weight, offset, theirs, layer.config)
    (expected * weighting.double()).sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(x.grad, same.grad, **close)
    for name, parameter in trained(layer).items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, **close)


def test_the_backward_pass_keeps_the_parameter_and_no_dense_copy(make_layer: MakeLayer) -> None:
    base = four_bit()
    layer = make_layer(base=base, dtype=torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with (
        layer.routing.assign(IDS),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        layer(torch.randn(6, 64, requires_grad=True))
    assert any(tensor is base.weight for tensor in kept)
    assert all(tensor.numel() < 64 * 48 for tensor in kept)


def test_a_gathered_weight_is_read_anew_in_the_backward_pass(make_layer: MakeLayer) -> None:
    """ZeRO-3 empties a parameter between the passes and fills it with other storage again."""
    layer = make_layer(base=four_bit(), dtype=torch.float32)
    x = torch.randn(6, 64)

    def gradient(release: bool) -> Tensor:
        start = x.clone().requires_grad_()
        with layer.routing.assign(IDS):
            y = layer(start)
            weight = layer.base_layer.weight
            content = weight.data.clone()
            if release:
                weight.data = torch.empty(0, dtype=torch.uint8)
                weight.data = content
            y.sum().backward()
        assert start.grad is not None
        return start.grad

    assert torch.equal(gradient(False), gradient(True))


def test_a_layer_without_an_adapter_keeps_the_parameter_alone() -> None:
    model = nn.Sequential(four_bit(), nn.ReLU())
    base = model[0]
    multiply_ourselves(model)
    x = torch.randn(2, 3, 64, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = base(x)
    assert len(kept) == 1
    assert kept[0] is base.weight
    y.sum().backward()
    same = x.detach().requires_grad_()
    expected = nn.functional.linear(same, dequantised(base), base.bias)
    expected.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, same.grad)


def test_without_a_task_the_output_is_the_base_exactly(make_layer: MakeLayer) -> None:
    layer = make_layer(base=four_bit(), dtype=torch.float32).eval()
    x = torch.randn(6, 64)
    with torch.no_grad():
        # Not four_bit()(x): on processors with AVX-512 it takes a kernel that wants 32 outputs a block.
        plain = four_bit()
        base = nn.functional.linear(x, dequantised(plain), plain.bias)
        with layer.routing.assign(IDS):
            mixed = layer(x)
        with layer.routing.assign(torch.full_like(IDS, -1)):
            alone = layer(x)
        with layer.routing.assign(IDS):  # the base-only pass has left the weight as it was
            again = layer(x)
    assert torch.equal(alone, base)
    assert torch.equal(mixed[IDS == -1], base[IDS == -1])
    assert torch.equal(mixed, again)
