"""What a step of one token a row computes: kernels beside plain torch, and plain torch beside its formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_lora_cli.kernels.head_norm import HeadNorms
from mtl_lora_cli.kernels.one_token import (
    Added,
    Ups,
    activated,
    attend,
    normed,
    product,
    put_by,
    whole,
)
from mtl_lora_cli.kernels.rotary import Turn

pytestmark = pytest.mark.slow  # in the interpreter: make kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, LOWS = 3, 4
SLOTS = [1, -1, 0]


@pytest.fixture
def same(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs something on kernels and in plain torch and compares."""

    def check(run: Callable[[], Sequence[Tensor]], close: float = 1e-5) -> None:
        monkeypatch.setenv("MTL_LORA_KERNELS", "plain")
        plain = run()
        monkeypatch.setenv("MTL_LORA_KERNELS", "triton")
        for one, two in zip(run(), plain, strict=True):
            assert one.dtype == two.dtype and one.shape == two.shape
            torch.testing.assert_close(one, two, rtol=close, atol=close)

    return check


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def added(spans: Sequence[tuple[int, int]], width: int) -> Added:
    """y and z as one product leaves them, two tasks, and a row of the base model alone."""
    both = normal(ROWS, width + len(spans) * LOWS, seed=3)
    matrix = torch.zeros(2, LOWS, width, device=DEVICE)
    starts = torch.zeros(width, dtype=torch.int32, device=DEVICE)
    for number, (start, stop) in enumerate(spans):
        matrix[:, :, start:stop] = normal(2, LOWS, stop - start, seed=4 + number)
        starts[start:stop] = number * LOWS
    slot = torch.tensor(SLOTS, dtype=torch.int32, device=DEVICE)
    return Added(both[:, :width], both[:, width:], Ups(matrix, tuple(spans), starts), slot)


def by_hand(one: Added) -> Tensor:
    """y_j += U_{j,slot} z_j, row by row and projection by projection, in float64."""
    assert one.z is not None and one.ups is not None
    y = one.y.double().clone()
    for row, slot in enumerate(SLOTS):
        for number, (start, stop) in enumerate(one.ups.spans):
            if slot >= 0:
                z = one.z[row, number * LOWS : (number + 1) * LOWS].double()
                y[row, start:stop] += z @ one.ups.matrix[slot, :, start:stop].double()
    return y


SPANS = [[(0, 24)], [(0, 8), (16, 24)]]  # one projection; the second of three has no adapter


@pytest.mark.parametrize("spans", SPANS)
def test_a_row_gets_what_its_task_adds(
    spans: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, same: Callable[..., None]
) -> None:
    one = added(spans, 24)
    monkeypatch.setenv("MTL_LORA_KERNELS", "plain")
    torch.testing.assert_close(whole(one).double(), by_hand(one), rtol=1e-5, atol=1e-5)
    same(lambda: [whole(added(spans, 24))])


def test_infinities_of_one_task_reach_no_other(same: Callable[..., None]) -> None:
    def run() -> list[Tensor]:
        one = added([(0, 24)], 24)
        assert one.ups is not None
        one.ups.matrix[1] = float("inf")
        return [whole(one)[1:]]

    same(run)
    assert run()[0].isfinite().all()


@pytest.mark.parametrize("bare", [False, True])
def test_stream_and_activation(same: Callable[..., None], bare: bool) -> None:
    one = added([(0, 24)], 24)
    two = added([(0, 12), (12, 24)], 24)
    if bare:
        one, two = Added(one.y), Added(two.y)
    x, weight = normal(ROWS, 24, seed=8), normal(24, seed=9)
    same(lambda: normed(x, one, weight, 1e-5))
    same(lambda: [activated(two, "silu"), activated(two, "gelu_tanh")])


def test_a_single_row_times_a_matrix(same: Callable[..., None]) -> None:
    wide = normal(70, 600, seed=1)
    h, bias = normal(1, 530), normal(70, seed=2)
    same(lambda: [product(h, wide[:, :530], bias), product(h, wide[:, :530], None)], 1e-4)


H, G, D, L = 4, 2, 8, 80


@pytest.mark.parametrize(("half", "pairs"), [(4, False), (2, False), (4, True), (0, False)])
@pytest.mark.parametrize("norms", [False, True])
def test_keys_and_values_go_to_their_places(
    same: Callable[..., None], half: int, pairs: bool, norms: bool
) -> None:
    width = (H + 2 * G) * D
    angles = normal(L, max(half, 1), seed=5)
    turned = Turn(angles.cos(), angles.sin(), pairs) if half else None
    heads = HeadNorms(normal(D, seed=6), normal(D, seed=7), 1e-5) if norms else None
    places = torch.tensor([0, 79, 7], dtype=torch.int32, device=DEVICE)

    def run() -> list[Tensor]:
        keys, values = torch.zeros(2, ROWS + 1, G, L, D, device=DEVICE)
        spans = [(0, H * D), (H * D, (H + G) * D), ((H + G) * D, width)]
        q = put_by(added(spans, width), heads, turned, places, keys, values, heads=H)
        return [q, keys, values]

    same(run)


@pytest.mark.parametrize(
    "rule", [{}, {"window": 5}, {"softcap": 2.0}, {"window": 70, "softcap": 2.0}]
)
@pytest.mark.parametrize("rows", [3, 300])
def test_attention_to_what_is_kept(
    same: Callable[..., None], monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any], rows: int
) -> None:
    """In parts that are joined, where there are few rows, and in one piece; beside a naive sum in float64."""
    if rows > 3 and DEVICE == "cpu":
        monkeypatch.setattr("mtl_lora_cli.kernels.triton_one_token._PROGRAMS", 1)
        rows = 3
    keys, values = normal(rows, 1, 140, D, seed=1), normal(rows, 1, 140, D, seed=2)
    q = normal(rows, 2 * D)
    at = [(0, 139, 64)[row % 3] for row in range(rows)]
    places = torch.tensor(at, dtype=torch.int32, device=DEVICE)

    def run() -> list[Tensor]:
        return [attend(q, keys, values, places, longest=139, scaling=0.3, **rule)]

    same(run)
    for row in range(3):
        first = max(0, at[row] + 1 - rule.get("window", 1000))
        k, v = (one[row, 0, first : at[row] + 1].double() for one in (keys, values))
        for head in range(2):
            score = k @ q[row, head * D : (head + 1) * D].double() * 0.3
            cap = rule.get("softcap")
            if cap:
                score = torch.tanh(score / cap) * cap
            right = score.softmax(0) @ v
            found = run()[0][row, head * D : (head + 1) * D].double()
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
