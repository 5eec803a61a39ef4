"""Our attention kernels under autograd, for layers that are transformers' own and ask for soft caps or sinks.

torch's variable-length attention knows neither; computed from the scores themselves, they take memory of the
square of an example's length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_lora_cli.engine.segment_forms import Rule
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.kernels.backend import in_triton
from mtl_lora_cli.kernels.tiles import (
    FORWARD,
    KEY_BACKWARD,
    QUERY_BACKWARD,
    largest_dim,
    launch_for,
)


def kernels_take(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: Rule) -> bool:
    """Whether `attend_in_kernels` computes this: half precision on a card.

    Args:
        q, k, v: as there.
        segments: of the N positions.
        rule: what a query sees.
    """
    dim = q.shape[-1]
    if not in_triton(q) or k.shape[-1] != dim or v.shape[-1] != dim:
        return False
    if dim > largest_dim() or dim % 2 or q.dtype == torch.float64:
        return False
    if q.is_cuda and q.dtype == torch.float32:
        return False
    if segments.blocks_of(rule) is not None:
        return False
    return rule.chunk is None or segments.longest <= rule.chunk


def attend_in_kernels(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: Rule, **scores: Any
) -> Tensor:
    """q [1, H, N, D], k and v [1, G, N, D] → [1, N, H, D].

    Args:
        q, k, v: as above.
        segments: of the N positions.
        rule: what a query sees, without chunks.
        scores: `scaling`, `softcap` and `sinks` of the kernels.
    """
    count = q.shape[2]
    buffer = torch.cat([x[0].transpose(0, 1).flatten(1) for x in (q, k, v)], dim=1)
    narrow = rule.window is not None and rule.window < count
    sizes = {
        "heads": q.shape[1],
        "key_heads": k.shape[1],
        "window": rule.window if narrow else None,
    }
    out = _Attend.apply(buffer, segments, {**sizes, **scores}, q.shape[-1])
    return out.unflatten(1, (q.shape[1], -1)).unsqueeze(0)


class _Attend(torch.autograd.Function):
    """[q | k | v] [N, (H + 2G) D] → [N, H D]."""

    @staticmethod
    def forward(
        ctx: Any, buffer: Tensor, segments: Segments, arguments: dict[str, Any], dim: int
    ) -> Tensor:
        from mtl_lora_cli.kernels import triton_attention

        out, lse = triton_attention.attention_forward(
            buffer,
            segments.tiles(launch_for(FORWARD, dim).tile),
            trees=segments.trees,
            **arguments,
        )
        ctx.save_for_backward(buffer, out, lse)
        ctx.static = (segments, arguments, dim)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        from mtl_lora_cli.kernels import triton_attention

        buffer, out, lse = ctx.saved_tensors
        segments, arguments, dim = ctx.static
        dbuffer = triton_attention.attention_backward(
            dout.contiguous(),
            buffer,
            out,
            lse,
            segments.tiles(launch_for(QUERY_BACKWARD, dim).tile),
            segments.key_tiles(launch_for(KEY_BACKWARD, dim).tile),
            trees=segments.trees,
            **{name: value for name, value in arguments.items() if name != "sinks"},
        )
        return dbuffer, None, None, None
