"""Attention over packed rows on the fused buffer [q | k | v], forward and backward.

Two ways that give the same numbers up to rounding: our Triton kernels (q, k, v and their gradients in
one buffer), and torch (`engine/torch_attention.py`), whose gradients are autograd's. `Packing.way` says
which.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mtl_lora_cli.engine.plan import AttentionPlan
from mtl_lora_cli.engine.segment_forms import Rule
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.engine.torch_attention import Scores, attend_again, attend_segments
from mtl_lora_cli.kernels import rounding
from mtl_lora_cli.kernels.backend import in_triton, roomy, with_room
from mtl_lora_cli.kernels.fp8 import Form
from mtl_lora_cli.kernels.head_norm import HeadNorms, head_norm, head_norm_gradient_
from mtl_lora_cli.kernels.rotary import Turn, rotate_
from mtl_lora_cli.kernels.tiles import (
    FORWARD,
    KEY_BACKWARD,
    QUERY_BACKWARD,
    largest_dim,
    launch_for,
)

Way = Literal["triton", "torch"]


@dataclass(frozen=True)
class Packing:
    """What attention needs to know of N packed positions, beside q, k and v.

    Attributes:
        heads, key_heads, head_dim: H, G and D.
        scaling: of the scores.
        cos, sin: float32 [N, R/2], the rotation of each position; None where nothing turns.
        segments: which positions see which.
        way: who does the work.
        window: keys that a query sees, its own among them; None: all before it.
        softcap: c, where scores are c tanh(s / c).
        pairs: what turns together; see `kernels/rotary.py`.
        query_scale: float32 [N], by which queries are multiplied when they are turned.
        sinks: [H], logits that take their share of a head's softmax and give nothing.
    """

    heads: int
    key_heads: int
    head_dim: int
    scaling: float
    cos: Tensor | None
    sin: Tensor | None
    segments: Segments
    way: Way
    window: int | None = None
    softcap: float | None = None
    pairs: bool = False
    query_scale: Tensor | None = None
    sinks: Tensor | None = None

    def of_layer(self, sinks: Tensor | None) -> Packing:
        """The same with what one layer alone has."""
        return self if sinks is None else replace(self, sinks=sinks)

    def ready(self, qkv: Tensor, norms: HeadNorms | None) -> Tensor:
        """q and k of the buffer [N, (H + 2G) D] normed and turned: in place where there are no norms."""
        if norms is not None:
            qkv = head_norm(qkv, norms, self._turn, heads=self.heads, key_heads=self.key_heads)
        elif self._turn is not None:
            rotate_(qkv, self._turn, heads=self.heads, key_heads=self.key_heads)
        return self._scaled_(qkv)

    def gradient_(self, dqkv: Tensor, qkv: Tensor, norms: HeadNorms | None) -> None:
        """The gradient of what `ready` was given, in the place of that of what it gave.

        Args:
            dqkv: [N, (H + 2G) D + room].
            qkv, norms: what `ready` was given; without norms qkv is not read.
        """
        own = self._scaled_(dqkv[:, : qkv.shape[1]])
        if norms is not None:
            head_norm_gradient_(
                own, qkv, norms, self._turn, heads=self.heads, key_heads=self.key_heads
            )
        elif self._turn is not None:
            rotate_(own, self._turn, heads=self.heads, key_heads=self.key_heads, back=True)

    def gradient_for(
        self, form: Form, dqkv: Tensor, qkv: Tensor, norms: HeadNorms | None
    ) -> rounding.Made:
        """The same in the form that a product wants; without room."""
        if form == "exact" or norms is not None or self._turn is None:
            self.gradient_(dqkv, qkv, norms)
            return dqkv
        own = self._scaled_(dqkv)
        return rounding.rotate_back(
            own, self._turn, form, heads=self.heads, key_heads=self.key_heads
        )

    def _scaled_(self, qkv: Tensor) -> Tensor:
        if self.query_scale is not None:
            queries = qkv[:, : self.heads * self.head_dim]
            queries.mul_(self.query_scale[:, None].to(qkv.dtype))
        return qkv

    @property
    def _turn(self) -> Turn | None:
        if self.cos is None or self.sin is None:
            return None
        return Turn(self.cos, self.sin, self.pairs)

    @property
    def scores(self) -> Scores:
        """What becomes of the scores, for torch."""
        return Scores(self.scaling, self.softcap, self.sinks)

    @property
    def rule(self) -> Rule:
        """How far a query sees, for torch."""
        return Rule(self.window)

    def split(self, qkv: Tensor) -> list[Tensor]:
        """q [1, H, N, D], k and v [1, G, N, D], views of the buffer."""
        each = qkv.unflatten(1, (self.heads + 2 * self.key_heads, self.head_dim))
        parts = each.split([self.heads, self.key_heads, self.key_heads], dim=1)
        return [part.transpose(0, 1).unsqueeze(0) for part in parts]

    def kernel_arguments(self, positions: int) -> dict[str, Any]:
        """What our kernels are told beside the tensors of so many positions.

        A window that is no shorter narrows nothing. Segments are not asked: one graph serves any.
        """
        narrow = self.window is not None and self.window < positions
        return {
            "heads": self.heads,
            "key_heads": self.key_heads,
            "scaling": self.scaling,
            "window": self.window if narrow else None,
            "softcap": self.softcap,
        }


def table_keys(head_dims: Iterable[int]) -> list[tuple[int, bool]]:
    """The tile tables (`Segments.tiles`) that the kernels ask for, for heads of these dimensions."""
    found = set()
    for dim in head_dims:
        found |= {(launch_for(table, dim).tile, False) for table in (FORWARD, QUERY_BACKWARD)}
        found.add((launch_for(KEY_BACKWARD, dim).tile, True))
    return sorted(found)


def kernels_know(plan: AttentionPlan) -> bool:
    """Whether our kernels compute a layer's attention."""
    return plan.head_dim <= largest_dim()


def pick_way(x: Tensor, plan: AttentionPlan) -> Way:
    """Our kernels in half precision on a card, for what they know; torch elsewhere."""
    if not in_triton(x) or not kernels_know(plan):
        return "torch"
    return "torch" if x.is_cuda and x.dtype in (torch.float32, torch.float64) else "triton"


def attend(qkv: Tensor, packing: Packing, *, learn: bool, room: int = 0) -> tuple[Tensor, Any]:
    """Causal attention inside each segment.

    Args:
        qkv: [N, (H + 2G) D], rotated.
        packing: of the N positions.
        learn: whether a gradient will be asked for.
        room: columns to leave free behind those of the result.

    Returns:
        [N, H·D + room], and what `attend_gradient` needs.
    """
    width = packing.heads * packing.head_dim
    if packing.way == "triton":
        from mtl_lora_cli.kernels import triton_attention

        out = roomy(qkv, qkv.shape[0], width, room)
        _, lse = triton_attention.attention_forward(
            qkv,
            packing.segments.tiles(launch_for(FORWARD, packing.head_dim).tile),
            sinks=packing.sinks,
            trees=packing.segments.trees,
            out=out[:, :width],
            **packing.kernel_arguments(len(qkv)),
        )
        return out, lse
    graph = learn and packing.scores.bare
    with torch.set_grad_enabled(graph):
        leaf = qkv.detach().requires_grad_(graph)
        q, k, v = packing.split(leaf)
        out = attend_segments(q, k, v, packing.scores, packing.segments, packing.rule)
        out = out.reshape(qkv.shape[0], width)
    return with_room(out.detach(), room), (leaf, out) if graph else None


def attend_gradient(
    dout: Tensor, qkv: Tensor, out: Tensor, state: Any, packing: Packing, *, room: int = 0
) -> Tensor:
    """The gradient of [q | k | v] as attention was given it, [N, (H + 2G) D + room].

    Args:
        dout: [N, H·D].
        qkv: rotated.
        out: [N, H·D], and `state`: as `attend` gave them.
        packing: of the N positions.
        room: columns to leave free behind those of the result.
    """
    width = qkv.shape[1]
    if packing.way == "triton":
        from mtl_lora_cli.kernels import triton_attention

        dqkv = roomy(qkv, qkv.shape[0], width, room)
        triton_attention.attention_backward(
            dout,
            qkv,
            out,
            state,
            packing.segments.tiles(launch_for(QUERY_BACKWARD, packing.head_dim).tile),
            packing.segments.key_tiles(launch_for(KEY_BACKWARD, packing.head_dim).tile),
            trees=packing.segments.trees,
            dqkv=dqkv[:, :width],
            **packing.kernel_arguments(len(qkv)),
        )
        return dqkv
    if state is None:
        gradient = _again(dout, qkv, packing)
    else:
        leaf, result = state
        gradient = torch.autograd.grad(result, leaf, dout)[0]
    return with_room(gradient, room)


def _again(dout: Tensor, qkv: Tensor, packing: Packing) -> Tensor:
    """The gradient of the rotated buffer where no graph was kept."""
    q, k, v = packing.split(qkv)
    dout = dout.unflatten(1, (packing.heads, packing.head_dim)).unsqueeze(0)
    parts = attend_again(dout, q, k, v, packing.scores, packing.segments, packing.rule)
    return torch.cat([part[0].transpose(0, 1).flatten(1) for part in parts], dim=1)
