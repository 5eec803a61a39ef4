"""What the projections of attention give, beside the queries, keys and values that attention takes.

Most families: nothing else, [q | k | v]. Qwen 3.5 has a gate beside each query, [q₁ | g₁ | q₂ | g₂ | … | k | v], and
attention's result is multiplied by σ(g). Gemma 4 norms values without a weight, v / rms(v), and in some layers
takes them from the keys' projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_lora_cli.engine.plan import AttentionPlan
from mtl_lora_cli.kernels.backend import roomy


@dataclass(frozen=True)
class HeadLayout:
    """See the module.

    Attributes:
        heads, key_heads, head_dim: H, G and D.
        gates: there are gates.
        keys_are_values: v is what the projection gave for k.
        value_eps: ε of the norm of values; None: they have none.
    """

    heads: int
    key_heads: int
    head_dim: int
    gates: bool
    keys_are_values: bool
    value_eps: float | None

    @staticmethod
    def of(plan: AttentionPlan) -> HeadLayout:
        """By a plan."""
        return HeadLayout(
            plan.heads,
            plan.key_heads,
            plan.head_dim,
            plan.gates,
            plan.keys_are_values,
            plan.value_eps,
        )

    @property
    def plain(self) -> bool:
        """The projections give [q | k | v], and nothing becomes of v."""
        return not (self.gates or self.keys_are_values) and self.value_eps is None

    def apart(self, given: Tensor) -> Tensor:
        """[q | k | v] [N, (H + 2G) D] of what the projections gave: new memory, or, where it is plain, the same."""
        if self.plain:
            return given
        queries, _, keys, values = self._views(given)
        if self.value_eps is not None:
            values = _unit(values, self.value_eps)[0].to(given.dtype)
        return torch.cat([part.flatten(1) for part in (queries, keys, values)], 1)

    def gradient(
        self, dheads: Tensor, dgates: Tensor | None, given: Tensor, *, room: int
    ) -> Tensor:
        """The gradient of what the projections gave, with room for so many columns behind it.

        Args:
            dheads: that of [q | k | v], with the same room.
            dgates: that of g [N, H, D], where there are gates.
            given: what the projections gave.
            room: columns.
        """
        if self.plain:
            return dheads
        parts = [self.heads, self.key_heads, self.key_heads]
        width = sum(parts) * self.head_dim
        queries, keys, values = dheads[:, :width].unflatten(1, (-1, self.head_dim)).split(parts, 1)
        if self.value_eps is not None:
            values = _unit_gradient(values, self._views(given)[3], self.value_eps)
        out = roomy(dheads, len(dheads), given.shape[1], room)
        own_queries, own_gates, own_keys, own_values = self._views(out[:, : given.shape[1]])
        own_queries.copy_(queries)
        own_keys.copy_(keys)
        if own_gates is not None and dgates is not None:
            own_gates.copy_(dgates)
        if self.keys_are_values:
            own_keys.add_(values)
        else:
            own_values.copy_(values)
        return out

    def gated(self, attended: Tensor, given: Tensor) -> Tensor:
        """attended [N, H·D, or with room behind it] times σ(g), new memory; without gates the same."""
        gates = self._views(given)[1]
        if gates is None:
            return attended
        width = self.heads * self.head_dim
        out = roomy(attended, len(attended), width, attended.shape[1] - width)
        torch.mul(attended[:, :width], gates.sigmoid().flatten(1), out=out[:, :width])
        return out

    def gate_gradient(
        self, dgated: Tensor, attended: Tensor, given: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of attended [N, H·D] and of g [N, H, D], from that of their product."""
        gates = self._views(given)[1]
        if gates is None:
            return dgated, None
        share = gates.sigmoid().flatten(1)
        dattended = dgated * share
        return dattended, (dattended * attended * (1 - share)).unflatten(1, (self.heads, -1))

    def _views(self, given: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """q, g, k and v as they lie there, [N, H or G, D]."""
        each = given.unflatten(1, (-1, self.head_dim))
        of_queries = self.heads * (2 if self.gates else 1)
        queries, keys = each[:, :of_queries], each[:, of_queries : of_queries + self.key_heads]
        values = keys if self.keys_are_values else each[:, of_queries + self.key_heads :]
        if not self.gates:
            return queries, None, keys, values
        both = queries.unflatten(1, (self.heads, 2))
        return both[:, :, 0], both[:, :, 1], keys, values


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) and 1 / rms(x) over the last axis, in float32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide * inverse, inverse


def _unit_gradient(dunit: Tensor, x: Tensor, eps: float) -> Tensor:
    """The gradient of x from that of x / rms(x), in x's dtype."""
    unit, inverse = _unit(x, eps)
    wide = dunit.to(unit.dtype)
    return (inverse * (wide - unit * (wide * unit).mean(-1, keepdim=True))).to(x.dtype)
