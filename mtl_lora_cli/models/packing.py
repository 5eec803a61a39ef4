"""Attention over packed rows on the fused buffer [q | k | v], forward and backward.

Three ways that give the same numbers up to rounding: our Triton kernels (positions rotated inside
them, q, k, v and their gradients in one buffer), torch's built-in variable-length attention, and a
loop over segments. `Packing.way` says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton
from mtl_lora_cli.kernels.tiles import (
    FORWARD,
    KEY_BACKWARD,
    LARGEST_DIM,
    QUERY_BACKWARD,
    launch_for,
)
from mtl_lora_cli.models.attention import Segments, attend_segments

Way = Literal["triton", "torch"]


@dataclass(frozen=True)
class Packing:
    """What attention needs to know of N packed positions, beside q, k and v.

    Attributes:
        heads, key_heads, head_dim: H, G and D.
        scaling: of the scores.
        cos, sin: float32 [N, D/2], the rotation of each position.
        segments: which positions see which.
        way: who does the work.
    """

    heads: int
    key_heads: int
    head_dim: int
    scaling: float
    cos: Tensor
    sin: Tensor
    segments: Segments
    way: Way

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q rotated [N, H, D], k rotated and v [N, G, D], from the buffer [N, (H + 2G) D]."""
        each = qkv.view(qkv.shape[0], self.heads + 2 * self.key_heads, self.head_dim)
        q, k, v = each.split([self.heads, self.key_heads, self.key_heads], dim=1)
        return self._rotated(q), self._rotated(k), v

    def kernel_arguments(self) -> dict[str, Any]:
        """What our kernels are told beside the tensors."""
        return {
            "heads": self.heads,
            "key_heads": self.key_heads,
            "scaling": self.scaling,
            "rotary": (self.cos, self.sin),
        }

    def _rotated(self, x: Tensor) -> Tensor:
        cos, sin = self.cos.unsqueeze(1), self.sin.unsqueeze(1)
        wide = x.to(torch.promote_types(x.dtype, cos.dtype))
        first, second = wide.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def table_keys() -> set[tuple[int, bool]]:
    """The tile tables (`Segments.tiles`) that the kernels may ask for."""
    queries = {entry.tile for table in (FORWARD, QUERY_BACKWARD) for entry in table.values()}
    keys = {entry.tile for entry in KEY_BACKWARD.values()}
    return {(tile, False) for tile in queries} | {(tile, True) for tile in keys}


def pick_way(x: Tensor, head_dim: int) -> Way:
    """Our kernels in half precision on a card, for heads that fit them; torch elsewhere."""
    if not in_triton(x) or head_dim > LARGEST_DIM:
        return "torch"
    return "torch" if x.is_cuda and x.dtype == torch.float32 else "triton"


def attend(qkv: Tensor, packing: Packing, *, learn: bool) -> tuple[Tensor, Any]:
    """Causal attention inside each segment.

    Args:
        qkv: [N, (H + 2G) D], not rotated.
        packing: of the N positions.
        learn: whether a gradient will be asked for.

    Returns:
        [N, H·D], and what `attend_gradient` needs.
    """
    if packing.way == "triton":
        from mtl_lora_cli.kernels import triton_attention

        block = launch_for(FORWARD, packing.head_dim).tile
        return triton_attention.attention_forward(
            qkv,
            packing.segments.tiles(block),
            contexts=packing.segments.key_index is not None,
            **packing.kernel_arguments(),
        )
    with torch.set_grad_enabled(learn):
        leaf = qkv.detach().requires_grad_(learn)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in packing.split(leaf))
        out = attend_segments(q, k, v, packing.scaling, packing.segments)
        out = out.reshape(qkv.shape[0], -1)
    return out.detach(), (leaf, out) if learn else None


def attend_gradient(dout: Tensor, qkv: Tensor, out: Tensor, state: Any, packing: Packing) -> Tensor:
    """d[q | k | v] from dout [N, H·D]; `state` as `attend` gave it."""
    if packing.way == "triton":
        from mtl_lora_cli.kernels import triton_attention

        queries = launch_for(QUERY_BACKWARD, packing.head_dim).tile
        keys = launch_for(KEY_BACKWARD, packing.head_dim).tile
        return triton_attention.attention_backward(
            dout,
            qkv,
            out,
            state,
            packing.segments.tiles(queries),
            packing.segments.tiles(keys, of_keys=True),
            **packing.kernel_arguments(),
        )
    leaf, result = state
    return torch.autograd.grad(result, leaf, dout)[0]
