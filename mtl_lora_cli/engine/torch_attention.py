"""Attention over packed rows in plain torch.

What a segment is and who sees whom is said in `segments.py`. On CUDA in half precision torch's built-in
variable-length attention does the work; in other dtypes there, calls over stacks of segments of similar
length; on a CPU a loop over segments. Soft caps and sinks are our kernels' on a card in half precision
(`kernel_attention.py`); elsewhere they are computed from the scores themselves, as transformers' eager
attention does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_lora_cli.engine.half_attention import HalfAttention
from mtl_lora_cli.engine.kernel_attention import attend_in_kernels, kernels_take
from mtl_lora_cli.engine.segment_forms import EVERYTHING, Rule
from mtl_lora_cli.engine.segments import Segments

LARGEST_HEAD = 256  # of torch's variable-length attention


@cache
def _kernel() -> Callable[..., Any]:
    """torch's variable-length attention; importing it takes seconds, so not before it is needed."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.12 asks to be told of grouped heads; before, the kernel took them without a word.
    grouped = "enable_gqa" in signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=True) if grouped else varlen_attn


@dataclass(frozen=True)
class Scores:
    """What becomes of the scores q·k before and in the softmax.

    Attributes:
        scaling: factor; None: 1 / √d.
        softcap: c, where scores are c tanh(s / c).
        sinks: [heads], a logit a head that takes its share and gives nothing.
        dropout: of the probabilities.
    """

    scaling: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0

    @property
    def bare(self) -> bool:
        """Whether torch's own attention computes this."""
        return self.softcap is None and self.sinks is None


def attend_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Scores,
    segments: Segments,
    rule: Rule = EVERYTHING,
) -> Tensor:
    """q [1, heads, N, d], k [1, key heads, N, d], v [1, key heads, N, e] → [1, N, heads, e]."""
    if not scores.bare and scores.dropout == 0.0 and kernels_take(q, k, v, segments, rule):
        scaling = 1 / math.sqrt(q.shape[-1]) if scores.scaling is None else scores.scaling
        asked = {"scaling": scaling, "softcap": scores.softcap, "sinks": scores.sinks}
        return attend_in_kernels(q, k, v, segments, rule, **asked)
    if not q.is_cuda:
        if q.dtype == torch.bfloat16 and scores.bare and scores.dropout == 0.0:
            scaling = 1 / math.sqrt(q.shape[-1]) if scores.scaling is None else scores.scaling
            return cast(Tensor, HalfAttention.apply(q, k, v, scaling, segments, rule))
        return _by_segment(q, k, v, scores, segments, rule)
    if _kernel_knows(q, v, scores, segments, rule):
        return _in_kernel(q, k, v, scores, segments, rule)
    return _in_stacks(q, k, v, scores, segments, rule)


def attend_again(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Scores,
    segments: Segments,
    rule: Rule = EVERYTHING,
) -> list[Tensor]:
    """dq, dk and dv of `attend_segments`, a segment at a time and computed again.

    For attention from the scores themselves, which would otherwise be kept for all segments at once.

    Args:
        dout: [1, N, heads, e].
    """
    found = [torch.zeros_like(x) for x in (q, k, v)]
    for part in segments.parts(rule):
        queries, keys = slice(part.first, part.end), slice(part.start, part.end)
        places = [one[:, :, at] for one, at in zip(found, (queries, keys, keys), strict=True)]
        with torch.enable_grad():
            leaves = [
                x[:, :, at].detach().requires_grad_()
                for x, at in zip((q, k, v), (queries, keys, keys), strict=True)
            ]
            out = _attention(leaves[0], leaves[1], leaves[2], part.seen, scores)
        own = dout[:, queries].transpose(1, 2)
        for place, gradient in zip(places, torch.autograd.grad(out, leaves, own), strict=True):
            place += gradient
    return found


def _kernel_knows(q: Tensor, v: Tensor, scores: Scores, segments: Segments, rule: Rule) -> bool:
    chunked = rule.chunk is not None and segments.longest > rule.chunk
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and max(q.shape[-1], v.shape[-1]) <= LARGEST_HEAD
        and scores.bare
        and scores.dropout == 0.0
        and not chunked
        and segments.blocks_of(rule) is None
    )


def _attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scores: Scores) -> Tensor:
    """One call: [B, heads, Q, d] over K keys → [B, heads, Q, e].

    Args:
        seen: bool, or of q's dtype where the scores are bare; broadcast to [B, heads, Q, K]; None:
            causal.
    """
    if not scores.bare:
        return _from_scores(q, k, v, seen, scores)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=seen,
        dropout_p=scores.dropout,
        is_causal=seen is None,
        scale=scores.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _from_scores(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scores: Scores) -> Tensor:
    """softmax([c tanh(q·k s / c), sink]) v, the sink's own share left out; softmax in float32."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
    scaling = 1 / math.sqrt(q.shape[-1]) if scores.scaling is None else scores.scaling
    logits = (q @ k.mT) * scaling
    if scores.softcap is not None:
        logits = torch.tanh(logits / scores.softcap) * scores.softcap
    if seen is None:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    logits = (
        logits.float().masked_fill(~seen, float("-inf"))
        if logits.dtype != torch.float64
        else (logits.masked_fill(~seen, float("-inf")))
    )
    if scores.sinks is not None:
        sinks = scores.sinks.to(logits.dtype)[None, :, None, None]
        logits = torch.cat([logits, sinks.expand(*logits.shape[:-1], 1)], dim=-1)
    shares = logits.softmax(dim=-1)[..., : k.shape[-2]].to(v.dtype)
    return F.dropout(shares, scores.dropout, training=scores.dropout > 0) @ v


def _by_segment(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, segments: Segments, rule: Rule
) -> Tensor:
    cut = segments.parts(rule, q.dtype if scores.bare else torch.bool)
    # Split at once: the gradient of a slice is as large as what it was cut from.
    queries = q.split([part.end - part.first for part in cut], dim=2)
    lengths = [end - start for start, end in segments.bounds]
    starts = [start for start, _ in segments.bounds]
    keys, values = (dict(zip(starts, x.split(lengths, dim=2), strict=True)) for x in (k, v))
    parts = [
        _attention(
            some,
            keys[part.start][:, :, : part.end - part.start],
            values[part.start][:, :, : part.end - part.start],
            part.seen,
            scores,
        )
        for part, some in zip(cut, queries, strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def _in_stacks(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, segments: Segments, rule: Rule
) -> Tensor:
    """One call a stack. What fills a segment up attends, too, but nothing reads its result."""
    stacks, source, back = segments.stacks(rule)
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
        out = _attention(some_q, some_k, some_v, stack.seen, scores)
        found.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(found).index_select(0, back).unsqueeze(0)


def _in_kernel(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, segments: Segments, rule: Rule
) -> Tensor:
    """A chain's keys are its ancestors alone, aligned at the end: there, a window is one of depths."""
    width = v.shape[-1]
    if width < q.shape[-1]:  # the kernel knows one width of heads
        v = F.pad(v, (0, q.shape[-1] - width))
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
    chains = segments.chains
    if chains.key_index is not None:
        k, v = k[chains.key_index], v[chains.key_index]
    before = -1 if rule.window is None or rule.window >= segments.longest else rule.window - 1
    out = _kernel()(
        q,
        k,
        v,
        chains.query_bounds,
        chains.key_bounds,
        chains.longest_query,
        chains.longest_key,
        scale=scores.scaling,
        window_size=(before, 0),  # causal: a chain sees all keys before its own
    )
    return out[..., :width].unsqueeze(0)
