"""Quantised weights made dense: for each product or once, the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.frozen import FrozenWeights

bnb = pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
SIZES = [
    (64, (48, 16, 16)),
    (64, (64,)),
    (64, (128, 128)),
    (128, (64,)),
] * 2  # in, outs; two layers


def four_bit(width: int, out: int) -> nn.Linear:
    layer = bnb.nn.Linear4bit(width, out, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    return layer.to(CPU)  # type: ignore[no-any-return]


def eight_bit(width: int, out: int) -> nn.Linear:
    layer = nn.Linear(width, out, bias=False)
    values = torch.randint(-127, 128, (out, width), dtype=torch.int8)
    layer.weight = nn.Parameter(values, requires_grad=False)
    layer.weight.SCB = torch.rand(out)  # type: ignore[attr-defined]
    return layer


@pytest.fixture(scope="module")
def groups() -> list[FrozenWeights]:
    torch.manual_seed(0)
    return [FrozenWeights([four_bit(width, out) for out in outs]) for width, outs in SIZES]


def exact(group: FrozenWeights) -> Tensor:
    return torch.cat(
        [bnb.functional.dequantize_4bit(one.data, one.quant_state) for one in group.weights()]
    )


def both(group: FrozenWeights, seed: int = 0) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ and dx = dy W."""
    torch.manual_seed(seed)
    out, width = group.shape
    x, dy = torch.randn(5, width), torch.randn(5, out)
    weights = group.weights()
    return group.product(x, weights), group.input_gradient(dy, weights)


@pytest.mark.parametrize("kind", [four_bit, eight_bit])
def test_what_is_left_expanded_gives_the_same_bits(
    kind: Callable[[int, int], nn.Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    group = FrozenWeights([kind(64, out) for out in (48, 16)])
    bytes_before = [one.clone() for one in group.weights()]
    on_the_fly = both(group)
    group.leave_expanded()
    monkeypatch.setattr(group, "_filled", None)  # nothing is expanded any more
    for one, other in zip(both(group), on_the_fly, strict=True):
        assert torch.equal(one, other)
    assert all(map(torch.equal, group.weights(), bytes_before))


def test_the_matrix_is_that_of_bitsandbytes(groups: list[FrozenWeights]) -> None:
    for group in groups:
        torch.manual_seed(0)
        out, width = group.shape
        x, dy = torch.randn(5, width), torch.randn(5, out)
        y, dx = both(group)
        torch.testing.assert_close(y, x @ exact(group).T, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dx, dy @ exact(group), rtol=1e-5, atol=1e-5)
