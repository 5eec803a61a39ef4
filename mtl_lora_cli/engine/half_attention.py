"""Attention over packed rows in bfloat16 on a CPU: products over stacks of short segments.

    P = softmax(s Q Kᵀ)     O = P V
    dV = Pᵀ dO     dP = dO Vᵀ     dS = P ⊙ (dP − rowsum(dO ⊙ O))     dQ = s dS K     dK = s dSᵀ Q

torch's own kernel there takes blocks one by one with a product that knows no bfloat16: of segments of some
seventy positions eight times as long as this. As in its kernels on cards (arXiv 2205.14135), scores, their softmax and
dP are float32, P and dS are rounded, and P is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_lora_cli.engine.segment_forms import Rule, Stack, Stacks
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.kernels.wide_product import wide_product

_SCORES = 2**19  # at once by each thread: 2 MiB in float32


class HalfAttention(torch.autograd.Function):
    """Args of `apply`: q [1, H, N, d], k [1, G, N, d], v [1, G, N, e], s, segments, rule. Returns [1, N, H, e]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, segments: Segments, rule: Rule
    ) -> Tensor:
        stacks, groups, found = segments.stacks(rule), k.shape[1], []
        read = [_read(x, stacks, groups) for x in (q, k, v)]
        for stack, *three in zip(stacks.stacks, *read, strict=True):
            out = three[0].new_empty(*three[0].shape[:-1], v.shape[-1])
            for piece in _pieces(stack, q.shape[1]):
                queries, keys, values = piece.of(three)
                shares = _shares(queries, keys, scaling, piece.seen)
                out[piece.queries] = (shares.flatten(1, 2) @ values).view_as(out[piece.queries])
            found.append(out)
        ctx.save_for_backward(q, k, v, whole := _written(found, stacks).transpose(1, 2))
        ctx.static = (scaling, segments, rule)
        return whole.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        scaling, segments, rule = ctx.static
        q, k, v, out = ctx.saved_tensors
        stacks, groups = segments.stacks(rule), k.shape[1]
        read = [_read(x, stacks, groups) for x in (q, k, v, out)]
        read.append(_read(dout.transpose(1, 2), stacks, groups, filled=False))
        found: list[list[Tensor]] = []
        for stack, *five in zip(stacks.stacks, *read, strict=True):
            sums = [torch.zeros_like(one, dtype=torch.float32) for one in five[:3]]
            for piece in _pieces(stack, q.shape[1]):
                _add_gradients(sums, piece, five, scaling)
            found.append([one.to(q.dtype) for one in sums])
        dq, dk, dv = (_written(each, stacks).transpose(1, 2) for each in zip(*found, strict=True))
        return dq, dk, dv, None, None, None


class _Piece(NamedTuple):
    """Some queries of some segments of a stack, and all that they may see.

    Attributes:
        queries: where they are in [S, G, R, L, d].
        keys: where those are in [S, G, 1, L, d].
        seen: float32, 0 or −∞; broadcast to [S, G, R, queries, keys].
    """

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    seen: Tensor

    def of(self, given: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """From q, k and v: [S·G, R, queries, d], [S·G, keys, d] and [S·G, keys, e]."""
        q, k, v = given
        keys, values = (x[self.keys].flatten(0, 1).flatten(1, 2) for x in (k, v))
        return q[self.queries].flatten(0, 1), keys, values


def _pieces(stack: Stack, heads: int) -> Iterator[_Piece]:
    length, every = stack.length, slice(None)
    each = heads * length**2
    rows = length if each <= _SCORES else max(16, _SCORES // (heads * length))
    some = max(1, _SCORES * torch.get_num_threads() // each)
    for first in range(0, stack.height, some):
        segments = slice(first, first + some)
        for begin in range(0, length, rows):
            end = min(begin + rows, length)
            last = end if stack.seen is None else length
            if stack.seen is None:
                seen = _causal(begin, end)
            else:
                own = stack.seen if len(stack.seen) == 1 else stack.seen[segments]
                seen = _masked(own[:, :, begin:end].unsqueeze(1))
            yield _Piece(
                (segments, every, every, slice(begin, end)),
                (segments, every, every, slice(0, last)),
                seen,
            )


@lru_cache(maxsize=64)
def _causal(begin: int, end: int) -> Tensor:
    """Of queries [begin, end) and keys [0, end)."""
    return _masked(torch.ones(end - begin, end, dtype=torch.bool).tril(begin))


def _masked(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf"))


def _shares(queries: Tensor, keys: Tensor, scaling: float, seen: Tensor) -> Tensor:
    """P [S·G, R, queries, keys], in the dtype of what is given."""
    count, repeats, rows, _ = queries.shape
    scores = wide_product(queries.flatten(1, 2), keys.mT).mul_(scaling)
    if len(seen) > 1 and seen.dim() > 2:
        scores.view(len(seen), -1, repeats, rows, keys.shape[1]).add_(seen)
    else:
        scores.view(count, repeats, rows, -1).add_(seen.view(rows, -1))
    return scores.view(count, repeats, rows, -1).softmax(-1).to(queries.dtype)


def _add_gradients(
    sums: Sequence[Tensor], piece: _Piece, given: Sequence[Tensor], scaling: float
) -> None:
    """dq, dk and dv of a piece, added to `sums`.

    Args:
        given: q, k, v, O and dO of the stack.
    """
    queries, keys, values = piece.of(given[:3])
    out, dout = (x[piece.queries].flatten(0, 1).flatten(1, 2) for x in given[3:])
    shares = _shares(queries, keys, scaling, piece.seen).flatten(1, 2)
    along = (dout.float() * out).sum(-1, keepdim=True)
    dscores = wide_product(dout, values.mT).sub_(along).mul_(scaling).mul_(shares)
    dscores = dscores.to(queries.dtype)
    rows = queries.flatten(1, 2)
    found = (dscores @ keys, dscores.mT @ rows, shares.mT @ dout)
    for total, where, own in zip(sums, (piece.queries, piece.keys, piece.keys), found, strict=True):
        total[where] += own.view(total[where].shape)


def _read(x: Tensor, stacks: Stacks, groups: int, *, filled: bool = True) -> list[Tensor]:
    """[1, heads, N, d] as each stack has it: [S, G, heads / G, L, d].

    Args:
        filled: what a segment is filled up with repeats its last position; else it is 0.
    """
    positions = x[0].transpose(0, 1)
    if filled:
        laid = positions.index_select(0, stacks.source)
    else:
        laid = positions.new_zeros(len(stacks.source), *positions.shape[1:])
        laid.index_copy_(0, stacks.back, positions)
    parts = laid.split([one.height * one.length for one in stacks.stacks])
    return [
        part.view(one.height, one.length, groups, -1, x.shape[-1])
        .permute(0, 2, 3, 1, 4)
        .contiguous()
        for part, one in zip(parts, stacks.stacks, strict=True)
    ]


def _written(each: Sequence[Tensor], stacks: Stacks) -> Tensor:
    """[S, G, R, L, d] of each stack as [1, N, G·R, d]."""
    laid = [x.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2) for x in each]
    return torch.cat(laid).index_select(0, stacks.back).unsqueeze(0)
