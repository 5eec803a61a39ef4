"""How torch's attention takes segments: part by part, as chains, or in stacks; and what a layer lets be seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_LEAST_FILLED = 0.8
_MOST_SCORES = 2**20


class Rule(NamedTuple):
    """What a layer lets a query see of what stands before it.

    Attributes:
        window: w, keys that a query sees, its own among them: depth_i − depth_j < w.
        chunk: c, where attention stays within blocks of c: ⌊depth_i / c⌋ = ⌊depth_j / c⌋.
    """

    window: int | None = None
    chunk: int | None = None

    def narrows(self, length: int) -> bool:
        """Whether a segment of so many positions notices it."""
        return any(size is not None and length > size for size in self)

    def seen(self, queries: Tensor, keys: Tensor) -> Tensor:
        """bool, from depths that are broadcast against each other."""
        allowed = keys <= queries
        if self.window is not None:
            allowed &= queries - keys < self.window
        if self.chunk is not None:
            allowed &= queries // self.chunk == keys // self.chunk
        return allowed


EVERYTHING = Rule()


class SegmentPart(NamedTuple):
    """Queries [first, end) over the keys [start, end).

    Attributes:
        start, first, end: positions.
        seen: [end - first, end - start], which queries see which keys; None: causal.
    """

    start: int
    first: int
    end: int
    seen: Tensor | None


def parts_of(
    start: int, end: int, reach: Tensor | None, rule: Rule, blocks: Tensor | None = None
) -> list[SegmentPart]:
    """A tree's trunk, which all of it sees, is causal; the rest needs a mask, as a narrow rule and blocks do."""
    if blocks is not None and bool((blocks[start:end] >= 0).any()):
        return [SegmentPart(start, start, end, _seen_with_blocks(start, end, reach, rule, blocks))]
    if reach is None or bool((reach[start:end] == end).all()):
        places = torch.arange(end - start)
        narrow = rule.narrows(end - start)
        seen = rule.seen(places[:, None], places) if narrow else None
        return [SegmentPart(start, start, end, seen)]
    trunk = start + int((reach[start:end] == end).int().argmin())
    queries, keys = torch.arange(trunk, end)[:, None], torch.arange(start, end)
    seen = (keys <= queries) & (queries < reach[start:end])
    if rule.narrows(end - start):
        depth = depths_of(reach[start:end] - start)
        seen &= rule.seen(depth[trunk - start :, None], depth)
    return [*parts_of(start, trunk, None, rule), SegmentPart(start, trunk, end, seen)]


def _seen_with_blocks(
    start: int, end: int, reach: Tensor | None, rule: Rule, blocks: Tensor
) -> Tensor:
    """bool [L, L] of one segment; of what lies behind, no window hides anything."""
    places = torch.arange(end - start)
    seen = places <= places[:, None]
    depth = places
    if reach is not None:
        seen &= places[:, None] < reach[start:end] - start
        depth = depths_of(reach[start:end] - start)
    own = blocks[start:end]
    seen |= (own[:, None] == own) & (own >= 0)
    if rule.narrows(end - start):
        seen &= rule.seen(depth[:, None], depth) | (places > places[:, None])
    return seen


def depths_of(reach: Tensor) -> Tensor:
    """How many ancestors each position has: those before it but for the ones that end before it.

        depth_i = i − |{j : reach_j ≤ i}|

    Args:
        reach: [N], of whole segments from position 0 on.

    Returns:
        int64 [N], on its device.
    """
    count = len(reach)
    ended = torch.zeros(count + 1, dtype=torch.int64, device=reach.device)
    ended.index_add_(0, reach.long(), torch.ones_like(reach, dtype=torch.int64))
    return torch.arange(count, device=reach.device) - ended[:count].cumsum(0)


class Chains(NamedTuple):
    """Segments as torch's variable-length attention takes them: causal, aligned at their ends.

    A tree falls into chains of positions of which each sees the one before; the keys of a chain are
    what its first position sees, and itself.

    Attributes:
        query_bounds: int32 [C + 1], cumulative lengths of the chains.
        key_bounds: int32 [C + 1], cumulative lengths of their keys.
        key_index: int64 [K], positions of the keys of all chains; None where they are the queries'.
        longest_query, longest_key: the kernel's limits.
    """

    query_bounds: Tensor
    key_bounds: Tensor
    key_index: Tensor | None
    longest_query: int
    longest_key: int


def chains_of(
    bounds: Sequence[tuple[int, int]], reach: Tensor | None, device: torch.device | str
) -> Chains:
    def cumulative(lengths: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)).to(device)

    if reach is None:
        lengths = [end - start for start, end in bounds]
        ends = cumulative(lengths)
        return Chains(ends, ends, None, max(lengths), max(lengths))
    until = reach.cpu().numpy()
    queries, keys = [], []
    for start, end in bounds:
        place = np.arange(start, end)
        broken = np.flatnonzero(until[start : end - 1] <= place[1:]) + start + 1
        for first, last in pairwise([start, *broken.tolist(), end]):
            before = np.flatnonzero(until[start:first] > first) + start
            queries.append(last - first)
            keys.append(np.concatenate([before, np.arange(first, last)]))
    counts = [len(some) for some in keys]
    index = torch.from_numpy(np.concatenate(keys)).to(device)
    return Chains(cumulative(queries), cumulative(counts), index, max(queries), max(counts))


class Stack(NamedTuple):
    """S segments of similar length side by side, each filled up to L places behind its own.

    Attributes:
        height, length: S and L.
        seen: bool [S, 1, L, L], which queries see which keys; None: causal, which hides what a
            segment is filled up with from its own positions.
    """

    height: int
    length: int
    seen: Tensor | None


class Stacks(NamedTuple):
    """All segments in stacks, which lie behind each other: P places for N positions.

    Attributes:
        stacks: in the order of their places.
        source: int64 [P], the position that each place reads; a segment is filled up with its last.
        back: int64 [N], the place of each position.
    """

    stacks: list[Stack]
    source: Tensor
    back: Tensor


def stacks_of(
    bounds: Sequence[tuple[int, int]],
    reach: Tensor | None,
    device: torch.device | str,
    rule: Rule,
    blocks: Tensor | None = None,
) -> Stacks:
    until = None if reach is None else reach.cpu()
    stacks, source = [], []
    back = np.empty(bounds[-1][1], dtype=np.int64)
    places = 0
    for some in alike(bounds):
        start, end = np.array(some).T[:, :, None]
        local = np.arange((end - start).max())
        position = start + local  # [S, L]
        inside = position < end
        position = np.minimum(position, end - 1)
        back[position[inside]] = places + np.flatnonzero(inside)
        places += inside.size
        source.append(position.ravel())
        seen = _stack_seen(some, len(local), until, rule, blocks)
        stacks.append(Stack(len(some), len(local), None if seen is None else seen.to(device)))
    return Stacks(
        stacks,
        torch.from_numpy(np.concatenate(source)).to(device),
        torch.from_numpy(back).to(device),
    )


def _stack_seen(
    bounds: Sequence[tuple[int, int]],
    length: int,
    reach: Tensor | None,
    rule: Rule,
    blocks: Tensor | None,
) -> Tensor | None:
    """bool [S, 1, L, L], or [1, 1, L, L] where it is the same for all; None: causal."""
    narrow = rule.narrows(length)
    local = torch.arange(length)
    if blocks is not None and any(bool((blocks[start:end] >= 0).any()) for start, end in bounds):
        seen = (local <= local[:, None]).repeat(len(bounds), 1, 1)
        for number, (start, end) in enumerate(bounds):
            own = slice(0, end - start)
            seen[number, own, own] = _seen_with_blocks(start, end, reach, rule, blocks)
        return seen[:, None]
    if reach is None or all(bool((reach[start:end] == end).all()) for start, end in bounds):
        return rule.seen(local[:, None], local)[None, None] if narrow else None
    found = []
    for start, end in bounds:
        limit = torch.full((length,), length)
        limit[: end - start] = reach[start:end] - start
        seen = (local <= local[:, None]) & (local[:, None] < limit)
        if narrow:
            depth = torch.full((length,), length)
            depth[: end - start] = depths_of(reach[start:end] - start)
            seen &= rule.seen(depth[:, None], depth) | torch.eye(length, dtype=torch.bool)
        found.append(seen)
    return torch.stack(found)[:, None]


def most_places(positions: int, longest: int) -> int:
    """Places of one stack of so many positions in segments of up to so many, but for what fills them up."""
    return max(longest, min(positions, _MOST_SCORES // longest))


def alike(bounds: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Segments that one stack holds, the longest first.

    At least a share f = `_LEAST_FILLED` of a stack's places are positions. With S segments of
    lengths l up to L, S L ≤ Σl / f, so places cost at most 1/f of positions, and scores, as
    S L² ≤ (Σl)² / (f² S) ≤ Σl² / f², at most 1/f² of those of the segments one by one: 1.25 and
    1.5625. A head has at most `_MOST_SCORES` at a time, unless a single segment has more.
    """
    some: list[tuple[int, int]] = []
    filled = 0
    for start, end in sorted(bounds, key=lambda bound: bound[0] - bound[1]):
        longest = some[0][1] - some[0][0] if some else end - start
        places = (len(some) + 1) * longest
        sparse = filled + end - start < _LEAST_FILLED * places
        if some and (sparse or places * longest > _MOST_SCORES):
            yield some
            some, filled = [], 0
        some.append((start, end))
        filled += end - start
    yield some
