"""Attention over packed rows: many segments behind each other, none seeing another.

A *segment* is a run of positions that attend to what stands before them in it: to all of that, or,
in a *tree*, to their ancestors: a prompt is computed once for many candidate answers, and so is what
some of them begin with. A tree lies in depth-first order, each subtree in one piece. So one number a
position says everything, its *reach*, the end of its subtree:

    query i sees key j  ⇔  j ≤ i < reach_j

On CUDA in half precision torch's built-in variable-length attention does the work; in other dtypes
there, calls over stacks of segments of similar length; on a CPU a loop over segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_lora_cli.kernels.tiles import tile_table

NAME = "mtl_lora_packed"

_LEAST_FILLED = 0.8
_MOST_SCORES = 2**20


@cache
def _kernel() -> Callable[..., Any]:
    """torch's variable-length attention; importing it takes seconds, so not before it is needed."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.12 asks to be told of grouped heads; before, the kernel took them without a word.
    grouped = "enable_gqa" in signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=True) if grouped else varlen_attn


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

    def with_tables(self, tables: dict[tuple[int, bool], Tensor]) -> Segments:
        """The same segments with tables that lie ready."""
        return replace(self, _made=dict(tables))

    def to(self, device: torch.device) -> Segments:
        """The same segments for tensors on a device."""
        reach = None if self.reach is None else self.reach.to(device, non_blocking=True)
        return Segments(self.bounds, reach, device)

    @property
    def parts(self) -> list[Part]:
        """Each segment as one call of torch's attention, a tree as two."""
        if "parts" not in self._made:
            reach = None if self.reach is None else self.reach.cpu()  # where looking costs no wait
            self._made["parts"] = [
                part if part.seen is None else part._replace(seen=part.seen.to(self.device))
                for bound in self.bounds
                for part in _parts(*bound, reach)
            ]
        return self._made["parts"]

    @property
    def chains(self) -> Chains:
        """The segments for torch's variable-length attention."""
        if "chains" not in self._made:
            self._made["chains"] = _chains(self.bounds, self.reach, self.device)
        return self._made["chains"]

    @property
    def stacks(self) -> Stacks:
        """The segments for torch's attention over batches."""
        if "stacks" not in self._made:
            self._made["stacks"] = _stacks(self.bounds, self.reach, self.device)
        return self._made["stacks"]

    @classmethod
    def build(cls, lengths: Sequence[int], reach: Tensor | None = None) -> Segments:
        """Segments of the given lengths, behind each other.

        Args:
            lengths: positions of each.
            reach: int32 [N], where they are trees; see `mtl_lora_cli.models.attention`.

        Raises:
            ValueError: a length below 1, or a reach for another number of positions.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"segments must hold at least one position, received {list(lengths)}")
        ends = np.cumsum([0, *lengths]).tolist()
        if reach is not None and reach.shape != (ends[-1],):
            raise ValueError(f"{ends[-1]} positions need as many reaches, not {list(reach.shape)}")
        return cls(tuple(pairwise(ends)), reach)


class Part(NamedTuple):
    """Queries [first, end) over the keys [start, end).

    Attributes:
        start, first, end: positions.
        seen: bool [end - first, end - start], which queries see which keys; None: causal.
    """

    start: int
    first: int
    end: int
    seen: Tensor | None


def _parts(start: int, end: int, reach: Tensor | None) -> list[Part]:
    """A tree's trunk, which all of it sees, is causal; the rest needs a mask."""
    if reach is None or bool((reach[start:end] == end).all()):
        return [Part(start, start, end, None)]
    trunk = start + int((reach[start:end] == end).int().argmin())
    queries, keys = torch.arange(trunk, end)[:, None], torch.arange(start, end)
    seen = (keys <= queries) & (queries < reach[start:end])
    return [Part(start, start, trunk, None), Part(start, trunk, end, seen)]


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
    bounds: Sequence[tuple[int, int]], reach: Tensor | None, device: torch.device | str
) -> Stacks:
    until = None if reach is None else reach.cpu().numpy()
    stacks, source = [], []
    back = np.empty(bounds[-1][1], dtype=np.int64)
    places = 0
    for some in _alike(bounds):
        start, end = np.array(some).T[:, :, None]
        local = np.arange((end - start).max())
        position = start + local  # [S, L]
        inside = position < end
        position = np.minimum(position, end - 1)
        seen = None
        if until is not None and (until[position] < end).any():
            limit = np.where(inside, until[position] - start, len(local))
            allowed = (local <= local[:, None]) & (local[:, None] < limit[:, None, :])
            seen = torch.from_numpy(allowed[:, None]).to(device)
        back[position[inside]] = places + np.flatnonzero(inside)
        places += inside.size
        source.append(position.ravel())
        stacks.append(Stack(len(some), len(local), seen))
    return Stacks(
        stacks,
        torch.from_numpy(np.concatenate(source)).to(device),
        torch.from_numpy(back).to(device),
    )


def _alike(bounds: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
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


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment, in the form transformers' attention interface asks for.

    Args:
        query: [1, heads, N, d]; key and value: [1, key heads, N, d].
        segments: of the N positions.

    Returns:
        [1, N, heads, d], and no weights.

    Raises:
        ValueError: no segments given, or a batch of more than one sequence.
    """
    if segments is None:
        raise ValueError("packed attention needs `segments`; call the model through PackedModel")
    if query.shape[0] != 1:
        raise ValueError(f"packed rows form one sequence, received a batch of {query.shape[0]}")
    return attend_segments(query, key, value, scaling, segments), None


def attend_segments(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, segments: Segments
) -> Tensor:
    """q [1, heads, N, d], k and v [1, key heads, N, d] → [1, N, heads, d]."""
    if not q.is_cuda:
        return _by_segment(q, k, v, scaling, segments)
    attend = _in_kernel if q.dtype in (torch.bfloat16, torch.float16) else _in_stacks
    return attend(q, k, v, scaling, segments)


def _by_segment(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, segments: Segments
) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    # Split at once: the gradient of a slice is as large as what it was cut from.
    queries = q.split([part.end - part.first for part in segments.parts], dim=2)
    lengths = [end - start for start, end in segments.bounds]
    starts = [start for start, _ in segments.bounds]
    keys, values = (dict(zip(starts, x.split(lengths, dim=2), strict=True)) for x in (k, v))
    parts = [
        F.scaled_dot_product_attention(
            some,
            keys[part.start][:, :, : part.end - part.start],
            values[part.start][:, :, : part.end - part.start],
            attn_mask=part.seen,
            is_causal=part.seen is None,
            scale=scaling,
            enable_gqa=gqa,
        )
        for part, some in zip(segments.parts, queries, strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def _in_stacks(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, segments: Segments
) -> Tensor:
    """One call a stack. What fills a segment up attends, too, but nothing reads its result."""
    stacks, source, back = segments.stacks
    sizes = [stack.height * stack.length for stack in stacks]
    heads = q.shape[1]

    def laid(x: Tensor) -> Sequence[Tensor]:
        places = x[0].transpose(0, 1).index_select(0, source)
        if x.shape[1] != heads:  # on a card torch has no 32-bit kernel for grouped heads
            places = places.repeat_interleave(heads // x.shape[1], dim=1)
        return places.split(sizes)

    found = []
    for stack, *three in zip(stacks, laid(q), laid(k), laid(v), strict=True):
        some_q, some_k, some_v = (
            x.unflatten(0, (stack.height, stack.length)).transpose(1, 2) for x in three
        )
        out = F.scaled_dot_product_attention(
            some_q,
            some_k,
            some_v,
            attn_mask=stack.seen,
            is_causal=stack.seen is None,
            scale=scaling,
        )
        found.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(found).index_select(0, back).unsqueeze(0)


def _in_kernel(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, segments: Segments
) -> Tensor:
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
    chains = segments.chains
    if chains.key_index is not None:
        k, v = k[chains.key_index], v[chains.key_index]
    out = _kernel()(
        q,
        k,
        v,
        chains.query_bounds,
        chains.key_bounds,
        chains.longest_query,
        chains.longest_key,
        scale=scaling,
        window_size=(-1, 0),  # causal, aligned at the end: a chain sees all keys before its own
    )
    return out.unsqueeze(0)


def register() -> None:
    """Make the implementation known to transformers under `NAME`; doing it twice is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    # The segments say everything; no mask is built.
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
