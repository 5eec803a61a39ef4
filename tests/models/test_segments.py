"""Where segments lie and which ones may attend to which."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from mtl_lora_cli.models.attention import Segments, packed_attention


@pytest.mark.parametrize("lengths", [[], [3, 0, 2], [-1], [0]])
def test_segments_hold_something(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=f"at least one position, received \\{lengths}"):
        Segments.build(lengths)


@pytest.mark.parametrize(
    ("contexts", "at_fault"),
    [([0, -1, -1], 0), ([-1, 1, -1], 1), ([-1, 2, -1], 1), ([-1, 0, 1], 2)],
    ids=["itself, first", "itself", "a later one", "a branch"],
)
def test_a_context_is_an_earlier_segment_without_one(
    contexts: Sequence[int], at_fault: int
) -> None:
    with pytest.raises(ValueError, match=f"segment {at_fault} cannot have segment"):
        Segments.build([2, 2, 2], contexts)


def test_one_context_for_each_segment() -> None:
    with pytest.raises(ValueError):
        Segments.build([2, 2, 2], [-1, -1])


def test_bounds_and_keys() -> None:
    segments = Segments.build([3, 2, 4, 1], [-1, 0, -1, 2])
    assert segments.bounds == ((0, 3), (3, 5), (5, 9), (9, 10))
    assert segments.query_bounds.tolist() == [0, 3, 5, 9, 10]
    assert segments.key_bounds.tolist() == [0, 3, 8, 12, 17]
    assert segments.key_index is not None
    assert segments.key_index.tolist() == [
        *(0, 1, 2),
        *(0, 1, 2, 3, 4),
        *(5, 6, 7, 8),
        *(5, 6, 7, 8, 9),
    ]
    assert (segments.longest_query, segments.longest_key) == (4, 5)


def test_without_contexts_keys_stand_where_queries_do() -> None:
    segments = Segments.build([3, 2])
    assert segments.key_index is None
    assert torch.equal(segments.key_bounds, segments.query_bounds)


def test_attention_equals_a_mask_written_out() -> None:
    """Against softmax over the whole row with everything forbidden masked out, in float64."""
    torch.manual_seed(0)
    lengths, contexts = [4, 2, 3, 2], [-1, 0, -1, 0]
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    n = len(owner)
    allowed = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(i + 1):
            own, theirs = int(owner[i]), int(owner[j])
            allowed[i, j] = own == theirs or contexts[own] == theirs
    q = torch.randn(1, 4, n, 8, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, n, 8, dtype=torch.float64)
    ours, _ = packed_attention(
        torch.nn.Identity(), q, k, v, None, scaling=0.3, segments=Segments.build(lengths, contexts)
    )
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    weights = (q @ k.transpose(2, 3) * 0.3).masked_fill(~allowed, float("-inf")).softmax(-1)
    torch.testing.assert_close(ours, (weights @ v).transpose(1, 2))


def test_a_batch_of_rows_is_refused() -> None:
    x = torch.randn(2, 1, 3, 4)
    with pytest.raises(ValueError, match="received a batch of 2"):
        packed_attention(torch.nn.Identity(), x, x, x, None, segments=Segments.build([3]))
