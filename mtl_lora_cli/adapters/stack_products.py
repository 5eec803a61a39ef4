"""The arithmetic of adapters on experts, for pairs sorted by their experts (`pairs.py`).

    y_s = W_e x_s + b_e + s · B M_t A x_s              one adapter for all experts (`shared`)
    y_s = W_e x_s + b_e + s · B_e M_{e,t} A_e x_s      one for each (`each`)

e is the pair's expert and t its position's task. What lies between A and B is `AdapterProducts`'; with one
adapter for each expert a slot is an expert and a task. `AdaptedStack` is the autograd function; the fused
engine's blocks are built of the same products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_lora_cli.adapters.frozen import step_of
from mtl_lora_cli.adapters.frozen_stack import FrozenStack
from mtl_lora_cli.adapters.function import AdapterProducts, Factors, Widths, wide_product
from mtl_lora_cli.adapters.pairs import Pairs
from mtl_lora_cli.adapters.routing import Slots
from mtl_lora_cli.kernels.backend import in_triton
from mtl_lora_cli.kernels.grouped import grouped, grouped_outer
from mtl_lora_cli.kernels.mix import filled_up, mix
from mtl_lora_cli.kernels.pair_mix import pair_mix_gradient


class StackProducts:
    """See the module.

    Args:
        products: what lies between A and B, and dropout.
        each: one adapter for each expert.
    """

    def __init__(self, products: AdapterProducts, *, each: bool) -> None:
        self._inner = products
        self.each = each

    def factors(
        self, dtype: torch.dtype, down: Tensor, up: Tensor, mixing: Tensor | None
    ) -> Factors:
        """A [k, in] and s B [out, m], with `each` [E, k, in] and [E, out, m], filled up with zeros as in
        `function.py`, and M [1, slots, m, k] of its own size.

        Args:
            dtype: of the activations.
            down: [nA, r, in], with `each` [E, nA, r, in].
            up: [n, out, r], with `each` [E, n, out, r].
            mixing: [1, P, m, k], with `each` [E, P, m, k].
        """
        widths = Widths.of([down.shape[-3:]], [up.shape[-3:]], step_of(down, dtype))
        below = down.detach().flatten(-3, -2).to(dtype)
        below = filled_up(below.mT, widths.down).mT.contiguous()
        beside = (up.detach() * self._inner.scales[0]).movedim(-3, -2).flatten(-2).to(dtype)
        if mixing is not None:
            mixing = mixing.detach().flatten(0, 1).unsqueeze(0)
        return Factors(below, filled_up(beside, widths.up), mixing)

    def mask(self, x: Tensor) -> Tensor | None:
        """As `AdapterProducts.mask`."""
        return self._inner.mask(x)

    def narrow(self, x: Tensor, mask: Tensor | None, factors: Factors, pairs: Pairs) -> Tensor:
        """z = A x [S, k]."""
        return self._product(self._inner.dropped(x, mask), factors.down, pairs)

    def spread(self, z: Tensor, factors: Factors, slots: Slots) -> Tensor:
        """u = M z [S, m]; `slots` are those of the pairs."""
        if self._gathers(z):
            return _mixed(z, factors, slots)
        return self._inner.spread(z, factors, slots)

    def add_up(self, y: Tensor, u: Tensor, factors: Factors, pairs: Pairs) -> None:
        """y += s B u in place."""
        if self.each:
            y.add_(grouped(u, factors.up, pairs.ends))
        else:
            y.addmm_(u, factors.up.T)

    def gradients(
        self, dy: Tensor, z: Tensor, factors: Factors, slots: Slots, pairs: Pairs
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """dz [S, k], dM as `factors` was given it (or None), and dyᵀ u [out, m], with `each` [E, out, m]."""
        u = self.spread(z, factors, slots)
        dup = self._outer(dy, u, pairs)
        du = self._transposed(dy, factors.up, pairs)
        dmixing: Tensor | None
        if self.each and self._inner.spread_by == "task" and factors.mixing is not None:
            own = factors.mixing.shape[1:]
            dmixing = pair_mix_gradient(du, z, slots.index, pairs.ends, own).unsqueeze(0)
            if in_triton(z):
                width = z.shape[1]
                dz = mix(du, factors.mixing, slots.index, transposed=True, width=width)
            else:
                dz = _mixed(du, factors, slots, transposed=True)
        else:
            dz, dmixing = self._inner.unspread(du, z, factors, slots)
        if dmixing is not None and self.each:
            dmixing = dmixing.unflatten(1, (factors.down.shape[0], -1))[0]
        return dz, dmixing, dup

    def add_input_gradient(
        self, dx: Tensor, dz: Tensor, mask: Tensor | None, factors: Factors, pairs: Pairs
    ) -> None:
        """dx += mask ⊙ (dz A) in place."""
        if mask is None and not self.each:
            dx.addmm_(dz, factors.down)
        else:
            dx.add_(self._inner.dropped(self._transposed(dz, factors.down, pairs), mask))

    def down_gradient(self, dz: Tensor, x: Tensor, mask: Tensor | None, pairs: Pairs) -> Tensor:
        """dA = dzᵀ (mask ⊙ x), [k, in], with `each` [E, k, in], float32 or better."""
        return self._outer(dz, self._inner.dropped(x, mask), pairs)

    def parameter_gradients(
        self, down: torch.Size, up: torch.Size, dtype: torch.dtype, ddown: Tensor, dup: Tensor
    ) -> tuple[Tensor, Tensor]:
        """dA and dyᵀ u in the shapes of the parameters, and in their dtype."""
        n, _, rank = up[-3:]
        beside = dup[..., : n * rank].unflatten(-1, (n, rank)).movedim(-2, -3)
        beside = (beside * self._inner.scales[0]).to(dtype).contiguous()
        return ddown[..., : down[-3] * down[-2], :].reshape(down).to(dtype), beside

    def _gathers(self, z: Tensor) -> bool:
        """Whether each pair's own M is picked out: in plain torch all M of all pairs would be many."""
        return self.each and self._inner.spread_by == "task" and not in_triton(z)

    def _product(self, x: Tensor, matrix: Tensor, pairs: Pairs) -> Tensor:
        return grouped(x, matrix, pairs.ends) if self.each else x @ matrix.T

    def _transposed(self, x: Tensor, matrix: Tensor, pairs: Pairs) -> Tensor:
        return grouped(x, matrix, pairs.ends, transposed=True) if self.each else x @ matrix

    def _outer(self, a: Tensor, b: Tensor, pairs: Pairs) -> Tensor:
        return grouped_outer(a, b, pairs.ends) if self.each else wide_product(a.T, b)


def _mixed(z: Tensor, factors: Factors, slots: Slots, *, transposed: bool = False) -> Tensor:
    """M z of each pair, or Mᵀ z, with M picked out; 0 without a task."""
    assert factors.mixing is not None
    own = factors.mixing[0].to(z.dtype)[slots.index.clamp(min=0).long()]  # [S, m, k]
    own = own.mT if transposed else own
    found = (own @ z[:, : own.shape[2]].unsqueeze(-1)).squeeze(-1)
    width = factors.down.shape[-2] if transposed else factors.up.shape[-1]
    return filled_up(torch.where((slots.index >= 0).unsqueeze(1), found, 0.0), width)


class AdaptedStack(torch.autograd.Function):
    """One projection of all experts, with an adapter or without.

    Args of `apply`: x [S, in]; the stack, products or None, pairs and the pairs' slots; mask [S, in] (bool
    or None); M or None; the frozen weight, and A and B or None. Returns y [S, out].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: FrozenStack,
        products: StackProducts | None,
        pairs: Pairs,
        slots: Slots | None,
        mask: Tensor | None,
        mixing: Tensor | None,
        weight: Tensor,
        down: Tensor | None,
        up: Tensor | None,
    ) -> Tensor:
        y = frozen.product(x, pairs, weight)
        ctx.static = (frozen, products, pairs, slots)
        if products is None or slots is None or down is None or up is None:
            ctx.save_for_backward(weight)
            return y
        factors = products.factors(x.dtype, down, up, mixing)
        z = products.narrow(x, mask, factors, pairs)
        products.add_up(y, products.spread(z, factors, slots), factors, pairs)
        ctx.save_for_backward(weight, x, z, mask, *factors, mixing, down, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        frozen, products, pairs, slots = ctx.static
        weight, *others = ctx.saved_tensors
        dx = frozen.input_gradient(dy, pairs, weight) if ctx.needs_input_grad[0] else None
        nothing = (None,) * 5
        if products is None or not others:
            return dx, *nothing, None, None, None, None
        x, z, mask, below, beside, between, mixing, down, up = others
        factors = Factors(below, beside, between)
        dz, dmixing, dup = products.gradients(dy, z, factors, slots, pairs)
        if dx is not None:
            products.add_input_gradient(dx, dz, mask, factors, pairs)
        ddown = products.down_gradient(dz, x, mask, pairs)
        if dmixing is not None:
            dmixing = dmixing.to(mixing.dtype)
        found = products.parameter_gradients(down.shape, up.shape, down.dtype, ddown, dup)
        return dx, *nothing, dmixing, None, *found
