"""Attention over packed rows: many segments behind each other, none seeing another.

A *segment* is a run of positions that attend causally to themselves. A *branch* is a segment that
also attends to all of an earlier segment, its context: a candidate answer to a prompt that is
computed once for all candidates.

On CUDA in half precision torch's built-in variable-length attention does the work; elsewhere, and
in float32, a loop over segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_lora_cli.kernels.tiles import tile_table

NAME = "mtl_lora_packed"


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
        contexts: for each segment the number of the segment it also attends to, or -1.
        query_bounds: int32 [S + 1], cumulative lengths of the queries.
        key_bounds: int32 [S + 1], cumulative lengths of the keys.
        key_index: int64 [K], positions of the keys of all segments; None where no segment has a
            context, and keys stand where queries do.
        longest_query, longest_key: the kernel's limits; no segment is longer.
    """

    bounds: tuple[tuple[int, int], ...]
    contexts: tuple[int, ...]
    query_bounds: Tensor
    key_bounds: Tensor
    key_index: Tensor | None
    longest_query: int
    longest_key: int
    _tables: dict[tuple[int, bool], Tensor] = field(default_factory=dict, compare=False)

    def tiles(self, block: int, *, of_keys: bool = False) -> Tensor:
        """The tile table of our kernels (`kernels/tiles.py`), on the segments' device."""
        key = (block, of_keys)
        if key not in self._tables:
            self._tables[key] = self.tile_table(block, of_keys=of_keys).to(
                self.query_bounds.device, non_blocking=True
            )
        return self._tables[key]

    def tile_table(
        self, block: int, *, of_keys: bool = False, capacity: int | None = None
    ) -> Tensor:
        """The same anew on the CPU, filled up to `capacity` rows."""
        lengths = [end - start for start, end in self.bounds]
        contexts = self.contexts if self.key_index is not None else None
        return tile_table(lengths, block, contexts, capacity, of_keys=of_keys)

    def with_tables(self, tables: dict[tuple[int, bool], Tensor]) -> Segments:
        """The same segments with tables that lie ready."""
        return replace(self, _tables=tables)

    @classmethod
    def build(
        cls, lengths: Sequence[int], contexts: Sequence[int] | None = None, device: Any = "cpu"
    ) -> Segments:
        """Segments of the given lengths, behind each other.

        Raises:
            ValueError: a length below 1, or a context that is not an earlier, context-free segment.
        """
        contexts = tuple(contexts) if contexts is not None else (-1,) * len(lengths)
        if len(contexts) != len(lengths):
            raise ValueError(f"{len(lengths)} segments need as many contexts, not {len(contexts)}")
        if not lengths or min(lengths) < 1:
            raise ValueError(f"segments must hold at least one position, received {list(lengths)}")
        ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
        bounds = tuple(pairwise(ends))
        keys = []
        for number, context in enumerate(contexts):
            if context >= number or (context >= 0 and contexts[context] >= 0):
                raise ValueError(f"segment {number} cannot have segment {context} as its context")
            keys.append(lengths[number] + (lengths[context] if context >= 0 else 0))
        key_index = None
        if any(context >= 0 for context in contexts):
            spans = []
            for bound, context in zip(bounds, contexts, strict=True):
                if context >= 0:
                    spans.append(torch.arange(*bounds[context]))
                spans.append(torch.arange(*bound))
            key_index = torch.cat(spans).to(device)
        key_ends = torch.tensor([0, *keys]).cumsum(0)
        return cls(
            bounds=bounds,
            contexts=contexts,
            query_bounds=torch.tensor(ends, dtype=torch.int32).to(device),
            key_bounds=key_ends.to(torch.int32).to(device),
            key_index=key_index,
            longest_query=max(lengths),
            longest_key=max(keys),
        )


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
    in_kernel = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    attend = _in_kernel if in_kernel else _by_segment
    return attend(q, k, v, scaling, segments)


def _by_segment(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, segments: Segments
) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    parts = []
    for (start, end), context in zip(segments.bounds, segments.contexts, strict=True):
        own_k, own_v = k[:, :, start:end], v[:, :, start:end]
        mask = None
        if context >= 0:
            first, last = segments.bounds[context]
            own_k = torch.cat([k[:, :, first:last], own_k], dim=2)
            own_v = torch.cat([v[:, :, first:last], own_v], dim=2)
            shape = (end - start, own_k.shape[2])
            mask = torch.ones(shape, dtype=torch.bool, device=q.device).tril(last - first)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, start:end],
                own_k,
                own_v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=gqa,
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2)


def _in_kernel(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, segments: Segments
) -> Tensor:
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
    if segments.key_index is not None:
        k, v = k[segments.key_index], v[segments.key_index]
    out = _kernel()(
        q,
        k,
        v,
        segments.query_bounds,
        segments.key_bounds,
        segments.longest_query,
        segments.longest_key,
        scale=scaling,
        window_size=(-1, 0),  # causal, aligned at the end: a branch sees all of its context
    )
    return out.unsqueeze(0)


def register() -> None:
    """Make the implementation known to transformers under `NAME`; doing it twice is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    # The segments say everything; no mask is built.
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
