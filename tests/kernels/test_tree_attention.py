"""Attention kernels over trees, forward and backward, against the naive lines in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.kernels import trees
from mtl_lora_cli.kernels.tiles import Launch
from mtl_lora_cli.kernels.trees import BLOCK, above_of, key_parts, parents_of
from mtl_lora_cli.kernels.triton_attention import attention_backward, attention_forward

from .test_triton_attention import DEVICE, SMALL, Case, draw, kinds, naive, table, tree

pytestmark = pytest.mark.slow  # in the interpreter: make kernels

# A trunk of 20 with two boughs, of which the first forks again; a plain segment; a tiny tree.
LENGTHS = [58, 17, 3]
REACH = tree(
    *[58] * 20, *[44] * 7, *[36] * 9, *[44] * 8, *[58] * 14,
    *[75] * 17,
    *[78] * 1, *[77] * 1, *[78] * 1,
)  # fmt: skip


def run(case: Case, reach: Tensor, launch: Launch = SMALL) -> tuple[Tensor, Tensor, Tensor]:
    segments = Segments.build(case.lengths, reach.cpu()).to(torch.device(DEVICE))
    tiles = segments.tiles(launch.tile)
    out, lse = attention_forward(
        case.qkv, tiles, trees=segments.trees, sinks=case.sinks, launch=launch, **case.sizes
    )
    gradient = attention_backward(
        case.dout, case.qkv, out, lse, tiles, segments.key_tiles(launch.tile),
        trees=segments.trees, turn=case.turn, query_launch=launch, key_launch=launch, **case.sizes,
    )  # fmt: skip
    return out, lse, gradient


def require_right(case: Case, reach: Tensor, launch: Launch = SMALL) -> None:
    for ours, theirs in zip(run(case, reach, launch), naive(case, reach), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)


def in_parts(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let the queries of a tile be shared out, as those of long trees are."""
    monkeypatch.setattr(trees, "_PART", size)
    monkeypatch.setattr(trees, "_POSITIONS", 4)


@pytest.mark.parametrize("tile, step, parts", [(32, 16, 512), (16, 16, 16)])
def test_a_position_of_a_tree_sees_its_ancestors(
    tile: int, step: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parts(monkeypatch, parts)
    case = draw(LENGTHS)
    shared = key_parts([(0, 58), (58, 75), (75, 78)], REACH.cpu().numpy(), tile)
    assert bool(len(shared.joins)) == (parts < 512)
    require_right(case, REACH, Launch(tile, step, split=parts == 512))
    assert not torch.allclose(naive(case, REACH)[2], naive(case)[2], atol=1e-2)


@pytest.mark.parametrize(
    "window, cap, sinks",
    [
        (9, 1.5, True),
        (None, 1.5, False),
        (None, None, True),
        *(
            pytest.param(*kind, marks=pytest.mark.long)
            for kind in [(9, None, False), (9, 1.5, False), (9, None, True), (None, 1.5, True)]
        ),
    ],
)
def test_in_a_tree_a_window_counts_ancestors(
    window: int | None, cap: float | None, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parts(monkeypatch, 16)
    reach = tree(*[38] * 14, *[29] * 4, *[24] * 6, *[29] * 5, *[38] * 9, *[43] * 5)
    require_right(kinds(draw([38, 5]), window, cap, sinks), reach)


def test_a_dimension_that_is_padded_is_turned_back(monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 16)
    require_right(draw([38, 5], dim=24), tree(*[38] * 20, *[29] * 9, *[38] * 9, *[43] * 5))


def test_two_runs_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 16)
    case, reach = draw([38]), tree(*[38] * 20, *[29] * 9, *[38] * 9)
    for one, other in zip(run(case, reach), run(case, reach), strict=True):
        assert torch.equal(one, other)


def test_unfilled_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that serves other trees of as many segments, as a graph's does."""
    in_parts(monkeypatch, 16)
    case = draw(LENGTHS)
    segments = Segments.build(LENGTHS, REACH.cpu()).to(torch.device(DEVICE))
    tiles = segments.tiles(16)
    out, lse = attention_forward(case.qkv, tiles, trees=segments.trees, launch=SMALL, **case.sizes)
    wide = segments.key_parts(16, segments=9)
    wide = wide._replace(parts=wide.parts.to(DEVICE), joins=wide.joins.to(DEVICE))
    found = [
        attention_backward(
            case.dout, case.qkv, out, lse, tiles, keys, trees=segments.trees,
            query_launch=SMALL, key_launch=SMALL, **case.sizes,
        )
        for keys in (segments.key_tiles(16), wide)
    ]  # fmt: skip
    assert len(wide.parts) > len(segments.key_parts(16).parts)
    assert torch.equal(*found)


def test_a_reach_that_does_not_fit_is_refused() -> None:
    case = draw([3])
    whole = Segments.build([3], torch.full((3,), 3, dtype=torch.int32)).trees
    assert whole is not None
    for wrong in (whole.reach.long(), whole.reach[:2]):
        given: Any = whole._replace(reach=wrong)
        with pytest.raises(ValueError, match=r"reach must be int32 \[3\], received"):
            attention_forward(case.qkv, table(case, 16), trees=given, **case.sizes)


def test_a_parent_is_the_last_position_that_is_seen() -> None:
    reach, bounds = REACH.cpu().numpy(), [(0, 58), (58, 75), (75, 78)]
    found, above = parents_of(reach, bounds), above_of(reach, bounds)
    for start, end in bounds:
        for place in range(start, end):
            seen = [j for j in range(start, place) if reach[j] > place]
            assert found[place] == (max(seen) if seen else -1)
            block = place - (place - start) % BLOCK
            assert above[place] == max((j for j in seen if j < block), default=-1)


def test_parts_share_out_all_queries_and_no_more_than_there_is_room_for() -> None:
    count = 4096
    reach = np.full(count, count, dtype=np.int32)  # one long example: every tile is seen to its end
    parts, joins, slots = key_parts([(0, count)], reach, 64)
    own = parts.numpy()
    for first in range(0, count, 64):
        some = own[own[:, 0] == first]
        assert (some[:, 3] - some[:, 2]).sum() == count - first
    assert (own[:, 4] >= 0).sum() == joins[:, 3].sum() <= slots
