"""Quantised weights made dense: all ways give the same bits, and what is made ahead is what is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.expanded import Ahead
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
    for group in groups[:4]:
        torch.manual_seed(0)
        out, width = group.shape
        x, dy = torch.randn(5, width), torch.randn(5, out)
        y, dx = both(group)
        torch.testing.assert_close(y, x @ exact(group).T, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dx, dy @ exact(group), rtol=1e-5, atol=1e-5)


@pytest.fixture
def counted(
    groups: list[FrozenWeights], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Ahead, list[int]]]:
    """The second stream's place without a card, and the numbers of the groups that were expanded."""
    made: list[int] = []
    real = FrozenWeights.fill

    def fill(self: FrozenWeights, out: Tensor, programs: int | None = None) -> Tensor:
        made.append(groups.index(self))
        return real(self, out, programs)

    monkeypatch.setattr(FrozenWeights, "fill", fill)
    ahead = Ahead(groups, CPU, torch.float32)
    for group in groups:
        group.ahead = ahead
    yield ahead, made
    for group in groups:
        group.ahead = None


def test_a_pass_expands_each_matrix_once_each_way(
    groups: list[FrozenWeights], counted: tuple[Ahead, list[int]]
) -> None:
    ahead, made = counted
    last = len(groups) - 1
    for group in groups:
        ahead.matrix(group, backward=False)
    assert made == list(range(last + 1))
    for group in reversed(groups):
        ahead.matrix(group, backward=True)
    assert made[last + 1 :] == list(range(last))[::-1][1:]  # the last two are there still
    made.clear()
    ahead.forget()
    # A block that computes its input again: gate and up, down's gradient, then their own.
    for number, backward in ((2, False), (3, True), (2, True)):
        ahead.matrix(groups[number], backward=backward)
    assert made == [2, 3, 1]


def test_whatever_comes_next_the_matrix_is_its_own(
    groups: list[FrozenWeights], counted: tuple[Ahead, list[int]]
) -> None:
    ahead, _ = counted
    drawn = random.Random(3)
    for _ in range(60):
        group = drawn.choice(groups)
        if drawn.random() < 0.1:
            for memory in ahead._memory:  # as a graph's replay leaves them
                memory.fill_(torch.nan)
            ahead.forget()
        found = ahead.matrix(group, backward=drawn.random() < 0.5)
        assert torch.equal(found[: group.shape[0], : group.shape[1]], exact(group))


def test_ahead_gives_the_same_bits(
    groups: list[FrozenWeights], counted: tuple[Ahead, list[int]]
) -> None:
    beside = [both(group, number) for number, group in enumerate(groups)]
    for group in groups:
        group.ahead = None
    for number, group in enumerate(groups):
        assert all(map(torch.equal, both(group, number), beside[number]))
