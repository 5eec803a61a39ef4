"""Where segments lie and which ones may attend to which."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mtl_lora_cli.models.attention import Segments, packed_attention


@pytest.mark.parametrize("lengths", [[], [3, 0, 2], [-1], [0]])
def test_segments_hold_something(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=f"at least one position, received \\{lengths}"):
        Segments.build(lengths)


def test_a_reach_for_each_position() -> None:
    with pytest.raises(ValueError, match=r"5 positions need as many reaches, not \[4\]"):
        Segments.build([3, 2], torch.tensor([3, 3, 3, 5], dtype=torch.int32))


# A trunk of three with two boughs, of which the first forks; two positions; a trunk with a branch
# that ends before the segment does.
LENGTHS = [8, 2, 4]
REACH = torch.tensor([8, 8, 8, 6, 5, 6, 8, 8, 10, 10, 14, 14, 13, 14], dtype=torch.int32)


def test_a_tree_is_its_trunk_and_the_rest() -> None:
    parts = Segments.build(LENGTHS, REACH).parts
    assert [part[:3] for part in parts] == [
        (0, 0, 3),
        (0, 3, 8),
        (8, 8, 10),
        (10, 10, 12),
        (10, 12, 14),
    ]
    assert [part.seen is None for part in parts] == [True, False, True, True, False]
    assert parts[1].seen is not None
    assert parts[1].seen.int().tolist() == [
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 0],
        [1, 1, 1, 0, 0, 0, 1, 1],
    ]


def test_a_tree_falls_into_chains() -> None:
    chains = Segments.build(LENGTHS, REACH).chains
    assert chains.query_bounds.tolist() == [0, 5, 6, 8, 10, 13, 14]
    assert chains.key_bounds.tolist() == [0, 5, 10, 15, 17, 20, 23]
    assert chains.key_index is not None
    assert chains.key_index.tolist() == [
        *(0, 1, 2, 3, 4),
        *(0, 1, 2, 3, 5),
        *(0, 1, 2, 6, 7),
        *(8, 9),
        *(10, 11, 12),
        *(10, 11, 13),
    ]
    assert (chains.longest_query, chains.longest_key) == (5, 5)


def test_without_trees_keys_stand_where_queries_do() -> None:
    chains = Segments.build([3, 2]).chains
    assert chains.key_index is None
    assert chains.query_bounds.tolist() == chains.key_bounds.tolist() == [0, 3, 5]


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax over the whole row with everything forbidden masked out."""
    n = len(REACH)
    start = torch.tensor([0, 8, 10]).repeat_interleave(torch.tensor(LENGTHS))
    i, j = torch.arange(n)[:, None], torch.arange(n)
    allowed = (start[:, None] == start) & (j <= i) & (i < REACH)
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    weights = (q @ k.transpose(2, 3) * 0.3).masked_fill(~allowed, float("-inf")).softmax(-1)
    return (weights @ v).transpose(1, 2)


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    q = torch.randn(1, 4, len(REACH), 8, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, len(REACH), 8, dtype=torch.float64)
    return q, k, v


def test_attention_equals_a_mask_written_out(qkv: tuple[torch.Tensor, ...]) -> None:
    segments = Segments.build(LENGTHS, REACH)
    ours, _ = packed_attention(torch.nn.Identity(), *qkv, None, scaling=0.3, segments=segments)
    torch.testing.assert_close(ours, written_out(*qkv))


def test_chains_say_the_same_as_a_mask(qkv: tuple[torch.Tensor, ...]) -> None:
    """What torch's variable-length attention is told, followed by hand."""
    q, k, v = (t[0] for t in qkv)
    chains = Segments.build(LENGTHS, REACH).chains
    assert chains.key_index is not None
    found = []
    for (first, last), (start, end) in zip(
        pairwise(chains.query_bounds.tolist()), pairwise(chains.key_bounds.tolist()), strict=True
    ):
        index = chains.key_index[start:end]
        some_k, some_v = (t[:, index].repeat_interleave(2, dim=0) for t in (k, v))
        scores = q[:, first:last] @ some_k.mT * 0.3
        behind = torch.ones_like(scores, dtype=torch.bool).triu(end - start - (last - first) + 1)
        found.append(scores.masked_fill(behind, float("-inf")).softmax(-1) @ some_v)
    ours = torch.cat(found, dim=1).transpose(0, 1)[None]
    torch.testing.assert_close(ours, written_out(*qkv))


def test_a_batch_of_rows_is_refused() -> None:
    x = torch.randn(2, 1, 3, 4)
    with pytest.raises(ValueError, match="received a batch of 2"):
        packed_attention(torch.nn.Identity(), x, x, x, None, segments=Segments.build([3]))
