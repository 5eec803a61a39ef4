"""Segments: which positions of a packed sequence belong together, and which of them see which.

A *segment* is a run of positions that attend to what stands before them in it: to all of that, or,
in a *tree*, to their ancestors: a prompt is computed once for many candidate answers, and so is what
some of them begin with. A tree lies in depth-first order, each subtree in one piece. So one number a
position says everything, its *reach*, the end of its subtree:

    query i sees key j  ⇔  j ≤ i < reach_j

A `Rule` narrows that, as models with local attention do: by depth, the number of a position's
ancestors, so that a window is as long in a tree as it is in each of its answers alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtl_lora_cli.kernels.tiles import tile_table
from mtl_lora_cli.kernels.trees import KeyParts, Trees, above_of, key_parts

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


@dataclass(frozen=True)
class Segments:
    """Where the segments of one packed sequence of N positions lie.

    Attributes:
        bounds: (start, end) of each segment, in order, without gaps.
        reach: int32 [N], where segments are trees: the first position that no longer sees this one.
            None where every position sees all before it in its segment.
        device: where tensors made from these lie.
    """

    bounds: tuple[tuple[int, int], ...]
    reach: Tensor | None = None
    device: torch.device | str = "cpu"
    _made: dict[Any, Any] = field(default_factory=dict, compare=False)

    def tiles(self, block: int, *, of_keys: bool = False) -> Tensor:
        """The tile table of our kernels (`kernels/tiles.py`), on the segments' device."""
        key = (block, of_keys)
        if key not in self._made:
            table = self.tile_table(block, of_keys=of_keys)
            self._made[key] = table.to(self.device, non_blocking=True)
        return self._made[key]

    def tile_table(
        self, block: int, *, of_keys: bool = False, capacity: int | None = None
    ) -> Tensor:
        """The same anew on the CPU, filled up to `capacity` rows."""
        lengths = [end - start for start, end in self.bounds]
        return tile_table(lengths, block, capacity, of_keys=of_keys)

    @property
    def trees(self) -> Trees | None:
        """What our kernels are told of trees, on the segments' device; None: there are none."""
        if self.reach is None:
            return None
        if "trees" not in self._made:
            above = torch.from_numpy(above_of(self._reach.numpy(), self.bounds))
            depth = self.depth
            assert depth is not None
            moved = above.to(self.device, non_blocking=True)
            self._made["trees"] = Trees(self.reach, moved, depth)
        return self._made["trees"]

    def key_tiles(self, block: int) -> Tensor | KeyParts:
        """What the kernel for the gradients of keys and values goes by, on the segments' device."""
        if self.reach is None:
            return self.tiles(block, of_keys=True)
        key = ("parts of keys", block)
        if key not in self._made:
            parts, joins, slots = self.key_parts(block)
            parts, joins = (one.to(self.device, non_blocking=True) for one in (parts, joins))
            self._made[key] = KeyParts(parts, joins, slots)
        return self._made[key]

    def key_parts(self, block: int, segments: int | None = None) -> KeyParts:
        """The same of trees anew on the CPU; see `kernels.trees.key_parts`."""
        return key_parts(self.bounds, self._reach.numpy(), block, segments=segments)

    @property
    def _reach(self) -> Tensor:
        """`reach` on the CPU, where looking costs no wait if the segments came from there."""
        assert self.reach is not None
        if "reach" not in self._made:
            self._made["reach"] = self.reach.cpu()
        return self._made["reach"]

    def ready(
        self,
        tables: dict[tuple[int, bool], Tensor],
        trees: Trees | None = None,
        parts: dict[int, KeyParts] | None = None,
    ) -> Segments:
        """The same segments with tables that lie ready on their device.

        Args:
            tables: by the arguments of `tiles`.
            trees, parts: of trees, the latter by the arguments of `key_tiles`.
        """
        made: dict[Any, Any] = dict(tables)
        if trees is None:
            return replace(self, _made=made)
        made |= {("parts of keys", block): one for block, one in (parts or {}).items()}
        made |= {"trees": trees, "depth": trees.depth}
        return replace(self, reach=trees.reach, _made=made)

    def and_more(self, lengths: Sequence[int]) -> Segments:
        """With further segments behind these, none of them a tree; on the CPU."""
        own = [end - start for start, end in self.bounds]
        if self.reach is None:
            return Segments.build([*own, *lengths])
        more = torch.tensor(lengths, dtype=torch.long)
        ends = (more.cumsum(0) + len(self.reach)).repeat_interleave(more)
        return Segments.build([*own, *lengths], torch.cat([self.reach, ends.to(self.reach.dtype)]))

    def to(self, device: torch.device) -> Segments:
        """The same segments for tensors on a device."""
        if self.reach is None:
            return Segments(self.bounds, None, device)
        reach = self.reach.to(device, non_blocking=True)
        return Segments(self.bounds, reach, device, {"reach": self._reach})

    def parts(self, rule: Rule = EVERYTHING, dtype: torch.dtype = torch.bool) -> list[SegmentPart]:
        """Each segment as one call of torch's attention, a tree as two.

        Args:
            rule: what a query sees.
            dtype: of the masks; of a float 0 stands for seen and −∞ for not, as torch would make it of
                a bool anew for each layer.
        """
        key = ("parts", rule, dtype)
        if key not in self._made:
            reach = None if self.reach is None else self._reach
            self._made[key] = [
                part if part.seen is None else part._replace(seen=self._mask(part.seen, dtype))
                for bound in self.bounds
                for part in _parts(*bound, reach, rule)
            ]
        return self._made[key]

    def _mask(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        seen = seen.to(self.device)
        if dtype == torch.bool:
            return seen
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf"))

    @property
    def chains(self) -> Chains:
        """The segments for torch's variable-length attention."""
        if "chains" not in self._made:
            self._made["chains"] = _chains(self.bounds, self.reach, self.device)
        return self._made["chains"]

    def stacks(self, rule: Rule = EVERYTHING) -> Stacks:
        """The segments for torch's attention over batches."""
        key = ("stacks", rule)
        if key not in self._made:
            self._made[key] = _stacks(self.bounds, self.reach, self.device, rule)
        return self._made[key]

    @property
    def depth(self) -> Tensor | None:
        """The number of each position's ancestors in its tree, int32 [N]; None without trees."""
        if self.reach is None:
            return None
        if "depth" not in self._made:
            self._made["depth"] = _depths(self.reach).to(torch.int32)
        return self._made["depth"]

    @property
    def longest(self) -> int:
        """Positions of the longest segment; in a tree no answer alone has more."""
        return max(end - start for start, end in self.bounds)

    def longer_than(self, limit: int) -> Tensor:
        """Whether each position's segment, or the longest way through its tree, is longer than that.

        Returns:
            bool [N] on the segments' device.
        """
        lengths = torch.tensor([end - start for start, end in self.bounds])
        depths = lengths
        if self.depth is not None:
            own = self.depth.cpu().split(lengths.tolist())
            depths = torch.stack([depth.max() + 1 for depth in own])
        return (depths > limit).repeat_interleave(lengths).to(self.device)

    def paths(self) -> list[Tensor]:
        """The positions of every sequence that a segment holds: of a tree, from its root to each leaf.

        Returns:
            int64 [L] each, ascending; on the CPU.
        """
        if self.reach is None:
            return [torch.arange(start, end) for start, end in self.bounds]
        reach = self.reach.cpu()
        found = []
        for start, end in self.bounds:
            own = reach[start:end]
            ends_here = own == torch.arange(start + 1, end + 1)
            for leaf in torch.nonzero(ends_here)[:, 0].tolist():
                before = torch.nonzero(own[: leaf + 1] > start + leaf)[:, 0]
                found.append(before + start)
        return found

    @classmethod
    def build(cls, lengths: Sequence[int], reach: Tensor | None = None) -> Segments:
        """Segments of the given lengths, behind each other.

        Args:
            lengths: positions of each.
            reach: int32 [N], where they are trees; see the module.

        Raises:
            ValueError: a length below 1, or a reach for another number of positions.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"segments must hold at least one position, received {list(lengths)}")
        ends = np.cumsum([0, *lengths]).tolist()
        if reach is not None and reach.shape != (ends[-1],):
            raise ValueError(f"{ends[-1]} positions need as many reaches, not {list(reach.shape)}")
        return cls(tuple(pairwise(ends)), reach)


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


def _parts(start: int, end: int, reach: Tensor | None, rule: Rule) -> list[SegmentPart]:
    """A tree's trunk, which all of it sees, is causal; the rest needs a mask, as a narrow rule does."""
    if reach is None or bool((reach[start:end] == end).all()):
        places = torch.arange(end - start)
        narrow = rule.narrows(end - start)
        seen = rule.seen(places[:, None], places) if narrow else None
        return [SegmentPart(start, start, end, seen)]
    trunk = start + int((reach[start:end] == end).int().argmin())
    queries, keys = torch.arange(trunk, end)[:, None], torch.arange(start, end)
    seen = (keys <= queries) & (queries < reach[start:end])
    if rule.narrows(end - start):
        depth = _depths(reach[start:end] - start)
        seen &= rule.seen(depth[trunk - start :, None], depth)
    return [*_parts(start, trunk, None, rule), SegmentPart(start, trunk, end, seen)]


def _depths(reach: Tensor) -> Tensor:
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


def _chains(
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


def _stacks(
    bounds: Sequence[tuple[int, int]],
    reach: Tensor | None,
    device: torch.device | str,
    rule: Rule,
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
        seen = _stack_seen(some, len(local), until, rule)
        stacks.append(Stack(len(some), len(local), None if seen is None else seen.to(device)))
    return Stacks(
        stacks,
        torch.from_numpy(np.concatenate(source)).to(device),
        torch.from_numpy(back).to(device),
    )


def _stack_seen(
    bounds: Sequence[tuple[int, int]], length: int, reach: Tensor | None, rule: Rule
) -> Tensor | None:
    """bool [S, 1, L, L], or [1, 1, L, L] where it is the same for all; None: causal."""
    narrow = rule.narrows(length)
    local = torch.arange(length)
    if reach is None or all(bool((reach[start:end] == end).all()) for start, end in bounds):
        return rule.seen(local[:, None], local)[None, None] if narrow else None
    found = []
    for start, end in bounds:
        limit = torch.full((length,), length)
        limit[: end - start] = reach[start:end] - start
        seen = (local <= local[:, None]) & (local[:, None] < limit)
        if narrow:
            depth = torch.full((length,), length)
            depth[: end - start] = _depths(reach[start:end] - start)
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
