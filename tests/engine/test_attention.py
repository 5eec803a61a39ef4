"""Windows, soft caps, sinks and trees in torch, in float64 against the formula over all pairs at once."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mtl_lora_cli.engine import torch_attention
from mtl_lora_cli.engine.attention import Packing, attend, attend_gradient
from mtl_lora_cli.engine.segment_forms import Rule
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.engine.torch_attention import Scores

HEADS, KEY_HEADS, DIM = 4, 2, 8
LENGTHS = [12, 3, 9]
# A trunk of four with two boughs, of which the first forks; three positions; one that ends early.
REACH = [12, 12, 12, 12, 9, 7, 7, 9, 9, 12, 12, 12, 15, 15, 15, 24, 24, 24, 21, 21, 21, 24, 24, 24]


class Kind(NamedTuple):
    window: int | None
    cap: float | None
    sinks: Tensor | None
    segments: Segments


def kinds() -> list[Kind]:
    sinks = torch.tensor([0.5, -1.0, 4.0, -9.0], dtype=torch.float64)
    trees = torch.tensor(REACH, dtype=torch.int32)
    return [
        Kind(window, cap, sink, Segments.build(LENGTHS, reach))
        for window, cap, sink, reach in product(
            (None, 1, 5), (None, 1.5), (None, sinks), (None, trees)
        )
    ]


def formula(row: Tensor, kind: Kind) -> Tensor:
    """[N, (H + 2G) D] → [N, H D]."""
    q, k, v = row.unflatten(1, (-1, DIM)).transpose(0, 1).split([HEADS, KEY_HEADS, KEY_HEADS])
    k, v = (x.repeat_interleave(HEADS // KEY_HEADS, 0) for x in (k, v))
    scores = 0.6 * q @ k.mT
    if kind.cap is not None:
        scores = kind.cap * torch.tanh(scores / kind.cap)
    seen = ancestors(kind)
    depth = seen.sum(1)
    if kind.window is not None:
        seen &= depth[:, None] - depth < kind.window
    shares = scores.exp() * seen
    total = shares.sum(-1, keepdim=True)
    if kind.sinks is not None:
        total = total + kind.sinks.exp()[:, None, None]
    return (shares / total @ v).transpose(0, 1).flatten(1)


def ancestors(kind: Kind) -> Tensor:
    """Which position sees which, without a window: bool [N, N]."""
    count = sum(LENGTHS)
    reach = kind.segments.reach
    seen = torch.zeros(count, count, dtype=torch.bool)
    for start, end in kind.segments.bounds:
        for i in range(start, end):
            for j in range(start, i + 1):
                seen[i, j] = reach is None or i < reach[j]
    return seen


def draw() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = (HEADS + 2 * KEY_HEADS) * DIM
    row = torch.randn(sum(LENGTHS), width, generator=generator, dtype=torch.float64)
    dout = torch.randn(sum(LENGTHS), HEADS * DIM, generator=generator, dtype=torch.float64)
    return row, dout


def test_the_engine_attends_by_the_formula() -> None:
    for kind in kinds():
        row, dout = draw()
        leaf = row.clone().requires_grad_()
        right = formula(leaf, kind)
        (wanted,) = torch.autograd.grad(right, leaf, dout)
        packing = Packing(
            heads=HEADS, key_heads=KEY_HEADS, head_dim=DIM, scaling=0.6, cos=None, sin=None,
            segments=kind.segments, way="torch", window=kind.window, softcap=kind.cap,
        ).of_layer(kind.sinks)  # fmt: skip
        out, state = attend(row, packing, learn=True)
        found = attend_gradient(dout, row, out, state, packing)
        torch.testing.assert_close(out, right.detach(), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("way", ["_in_stacks", "_by_segment"])
def test_every_way_in_torch_attends_by_the_formula(way: str) -> None:
    for kind in kinds():
        row, _ = draw()
        parts = row.unflatten(1, (-1, DIM)).split([HEADS, KEY_HEADS, KEY_HEADS], 1)
        q, k, v = (part.transpose(0, 1)[None] for part in parts)
        scores = Scores(0.6, kind.cap, kind.sinks)
        out = getattr(torch_attention, way)(q, k, v, scores, kind.segments, Rule(kind.window))
        torch.testing.assert_close(out[0].flatten(1), formula(row, kind), rtol=1e-11, atol=1e-11)


def test_depths_are_counted() -> None:
    found = Segments.build(LENGTHS, torch.tensor(REACH, dtype=torch.int32)).depth
    assert found is not None and found.dtype == torch.int32
    kind = Kind(None, None, None, Segments.build(LENGTHS, torch.tensor(REACH, dtype=torch.int32)))
    assert found.tolist() == (ancestors(kind).sum(1) - 1).tolist()
