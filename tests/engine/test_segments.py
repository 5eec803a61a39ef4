"""Where segments lie and which ones may attend to which."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from mtl_lora_cli.engine import torch_attention as attention
from mtl_lora_cli.engine.segment_forms import EVERYTHING, Rule
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.engine.torch_attention import Scores
from mtl_lora_cli.models.registered import NotHonoured, packed_attention


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
    parts = Segments.build(LENGTHS, REACH).parts()
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


def test_segments_of_similar_length_lie_in_stacks() -> None:
    stacks, source, back = Segments.build([3, 1, 4, 1]).stacks()
    assert stacks == [(2, 4, None), (2, 1, None)]
    assert source.tolist() == [4, 5, 6, 7, 0, 1, 2, 2, 3, 8]
    assert back.tolist() == [4, 5, 6, 8, 0, 1, 2, 3, 9]
    assert source[back].tolist() == list(range(9))


def test_a_tree_in_a_stack_sees_what_it_sees_alone() -> None:
    segments = Segments.build(LENGTHS, REACH)
    assert [stack[:2] for stack in segments.stacks().stacks] == [(1, 8), (1, 4), (1, 2)]
    for stack, part in zip(segments.stacks().stacks, (1, 4, None), strict=True):
        alone = None if part is None else segments.parts()[part].seen
        if alone is None:
            assert stack.seen is None
        else:
            assert stack.seen is not None
            assert stack.seen[0, 0, -len(alone) :].equal(alone)


MIXED = [*range(1, 301, 13), 300, 40, 40, 2, 1, 1]


def test_stacks_are_well_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = Segments.build(MIXED)
    stacks, source, _ = segments.stacks()
    places = [stack.height * stack.length for stack in stacks]
    assert sum(places) == len(source) <= 1.25 * sum(MIXED)
    scores = sum(stack.height * stack.length**2 for stack in stacks)
    assert scores <= 1.25**2 * sum(length**2 for length in MIXED)
    assert len(stacks) < len(MIXED) / 2
    monkeypatch.setattr("mtl_lora_cli.engine.segment_forms._MOST_SCORES", 20_000)
    for stack in Segments.build(MIXED).stacks().stacks:
        assert stack.height == 1 or stack.height * stack.length**2 <= 20_000


def forked(lengths: list[int]) -> torch.Tensor:
    """Every segment but each third forks at its middle: a bough of a third of the rest, then another."""
    reach: list[int] = []
    for number, length in enumerate(lengths):
        end = len(reach) + length
        trunk = length if number % 3 == 0 else (length + 1) // 2
        bough = (length - trunk) // 3
        first = len(reach) + trunk + bough
        reach += [end] * trunk + [first] * bough + [end] * (length - trunk - bough)
    return torch.tensor(reach, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("key_heads", [6, 2])
@pytest.mark.parametrize("trees", [False, True], ids=["causal", "trees"])
def test_stacks_equal_the_segments_one_by_one(
    dtype: torch.dtype, key_heads: int, trees: bool
) -> None:
    segments = Segments.build(MIXED, forked(MIXED) if trees else None)
    stacks = segments.stacks().stacks
    assert any(stack.seen is not None for stack in stacks) == trees
    torch.manual_seed(0)
    row = torch.randn(sum(MIXED), 6 + 2 * key_heads, 16, dtype=dtype, requires_grad=True)
    dout = torch.randn(1, sum(MIXED), 6, 16, dtype=dtype)

    def run(attend: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        parts = row.split([6, key_heads, key_heads], dim=1)
        out = attend(
            *(part.transpose(0, 1)[None] for part in parts), Scores(0.3), segments, EVERYTHING
        )
        return out, torch.autograd.grad(out, row, dout)[0]

    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    for ours, theirs in zip(run(attention._in_stacks), run(attention._by_segment), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("form", ["causal", "trees", "blocks", "blocks in windows"])
def test_a_card_attends_as_a_cpu_does(form: str) -> None:
    """In float64, where stacks do it there and the loop over segments does it here."""
    blocks = None
    if (
        "blocks" in form
    ):  # of PaliGemma, and of Gemma: seven positions behind the first three see each other
        places = torch.cat([torch.arange(length) for length in MIXED])
        owner = torch.arange(len(MIXED)).repeat_interleave(torch.tensor(MIXED))
        blocks = torch.where((places >= 3) & (places < 10), owner, -1).to(torch.int32)
    reach = forked(MIXED) if form == "trees" else None
    segments = Segments.build(MIXED, reach, blocks, in_windows="windows" in form)
    rule = Rule(5) if form == "blocks in windows" else EVERYTHING
    torch.manual_seed(0)
    q = torch.randn(1, 6, sum(MIXED), 16, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 1, 2, sum(MIXED), 16, dtype=torch.float64)
    here = attention.attend_segments(q, k, v, Scores(0.3), segments, rule)
    there = attention.attend_segments(
        q.cuda(), k.cuda(), v.cuda(), Scores(0.3), segments.to(torch.device("cuda")), rule
    )
    assert "blocks" not in form or not torch.equal(
        here, attention.attend_segments(q, k, v, Scores(0.3), Segments.build(MIXED), rule)
    )
    torch.testing.assert_close(there.cpu(), here, rtol=1e-12, atol=1e-12)
    dout = torch.randn_like(here)
    found, expected = (torch.autograd.grad(out, q, dout.to(out.device))[0] for out in (there, here))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_what_fills_a_segment_up_comes_from_itself() -> None:
    """An infinity in one segment reaches neither another one in its stack nor its gradient."""
    segments = Segments.build([3, 4, 4])
    assert [stack[:2] for stack in segments.stacks().stacks] == [(3, 4)]
    torch.manual_seed(0)
    leaf = torch.randn(1, 2, 11, 8)
    leaf[:, :, 2] = float("inf")
    leaf.requires_grad_()
    out = attention._in_stacks(leaf, leaf, leaf, Scores(), segments, EVERYTHING)
    gradient = torch.autograd.grad(out[:, 3:].sum(), leaf)[0]
    assert out[:, 3:].isfinite().all()
    assert not out[:, 2].isfinite().any()
    assert gradient[:, :, 3:].isfinite().all()


def test_a_batch_of_rows_is_refused() -> None:
    x = torch.randn(2, 1, 3, 4)
    with pytest.raises(NotHonoured, match="not within one packed sequence of 3"):
        packed_attention(torch.nn.Identity(), x, x, x, None, segments=Segments.build([3]))


def test_segments_longer_than_a_limit() -> None:
    """Of a tree the longest way through it counts, not its positions together."""
    chains = Segments.build([3, 5, 1]).longer_than(3)
    assert chains.tolist() == [False] * 3 + [True] * 5 + [False]
    # A trunk of two, behind it an answer of two and one of one; then a chain of four.
    reach = torch.tensor([5, 5, 4, 4, 5, 9, 9, 9, 9], dtype=torch.int32)
    trees = Segments.build([5, 4], reach)
    assert trees.longer_than(3).tolist() == [True] * 9
    assert trees.longer_than(4).tolist() == [False] * 9
    deeper = Segments.build([5, 5], torch.tensor([5, 5, 4, 4, 5, *[10] * 5], dtype=torch.int32))
    assert deeper.longer_than(4).tolist() == [False] * 5 + [True] * 5


@pytest.mark.parametrize("form", ["causal", "window", "trees", "trees in a window", "long"])
def test_bfloat16_on_a_cpu_is_as_near_to_float64_as_torch_is(form: str) -> None:
    """Beside the softmax written out over the whole row, and no further from it than torch's own attention."""
    lengths = [400, 20] if form == "long" else [1, 40, 7, 90, 90, 3, 2, 60]
    segments = Segments.build(lengths, forked(lengths) if "trees" in form else None)
    rule = Rule(5) if "window" in form else EVERYTHING
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(lengths), 16).bfloat16() for heads in (6, 2, 2))
    dout = torch.randn(1, sum(lengths), 6, 16).bfloat16()

    def run(attend: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, Scores(0.3), segments, rule)
        found = [out, *torch.autograd.grad(out, leaves, dout.to(dtype))]
        return [one.detach().double() for one in found]

    def plainly(*given: Any) -> torch.Tensor:
        queries, keys, values = given[:3]
        own = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        seen = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
        for part in segments.parts(rule):
            allowed = part.seen
            if allowed is None:
                allowed = torch.ones(part.end - part.first, part.end - part.start).tril().bool()
            seen[part.first : part.end, part.start : part.end] = allowed
        assert not seen[own[:, None] != own].any()
        keys, values = (x.repeat_interleave(3, dim=1) for x in (keys, values))
        logits = (0.3 * queries @ keys.mT).masked_fill(~seen, float("-inf"))
        return (logits.softmax(-1) @ values).transpose(1, 2)

    exact = run(plainly, torch.float64)
    ours, theirs = (
        [(one - right).norm() / right.norm() for one, right in zip(found, exact, strict=True)]
        for found in (
            run(attention.attend_segments, torch.bfloat16),
            run(attention._by_segment, torch.bfloat16),
        )
    )
    for own, usual in zip(ours, theirs, strict=True):
        assert own <= max(1.2 * float(usual), 4e-3)
