"""The second half of a decoder layer whose MLP is a mixture of experts, as `mlp_block.py` has one MLP.

    x' = x + δ,   h = before x',   p = softmax(R h),   T = the k largest of p,   v_e = p_e, or p_e / Σ_T p
    δ' = m · after(Σ_{e ∈ T} v_e D_e(f(G_e h) ⊙ (U_e h)))

Router and experts are frozen and carry no adapter; gradients go through both to h. Positions are sorted by
their experts, so that each expert is one product, or all are one grouped product. With dy the gradient of
the sum, dv_e = ⟨D_eᵀ dy, a_e⟩: what an expert gave is needed by nobody again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_lora_cli.engine.halves import ExpertsHalf
from mtl_lora_cli.engine.plan import ExpertsPlan
from mtl_lora_cli.engine.saved import Keep, Pass, Saved, both_gradients, opened
from mtl_lora_cli.engine.sizes import LayerSizes, Load, ModelSizes
from mtl_lora_cli.kernels.gated import gated, gated_gradient
from mtl_lora_cli.kernels.grouped import grouped


class RouterChoice(NamedTuple):
    """Which experts each of M positions asks, and in which order S = M k pairs are computed.

    Attributes:
        shares: p [M, E], float32 or better.
        chosen: int64 [M, k].
        order: int64 [S], pairs (position · k + place) sorted by expert.
        ends: int32 [E], where each expert's pairs end.
    """

    shares: Tensor
    chosen: Tensor
    order: Tensor
    ends: Tensor

    @property
    def position(self) -> Tensor:
        """Of each pair, int64 [S]."""
        return self.order // self.chosen.shape[1]

    def summed(self, pairs: Tensor) -> Tensor:
        """The sum over each position's pairs, [S, d] → [M, d]; always in the same order."""
        back = torch.empty_like(self.order).scatter_(
            0, self.order, torch.arange(len(self.order), device=self.order.device)
        )
        return pairs[back].view(*self.chosen.shape, -1).sum(1)


def choose(h: Tensor, router: Tensor, top: int, chosen: Tensor | None = None) -> RouterChoice:
    """The router's choice for h [M, d]; `chosen` where it was made before."""
    logits = torch.nn.functional.linear(h, router)
    shares = logits.to(torch.promote_types(h.dtype, torch.float32)).softmax(-1)
    if chosen is None:
        chosen = shares.topk(top, dim=-1).indices
    experts, order = chosen.flatten().sort(stable=True)
    counts = torch.zeros(router.shape[0], dtype=torch.int64, device=h.device)
    counts.scatter_add_(0, experts, torch.ones_like(experts))
    return RouterChoice(shares, chosen, order, counts.cumsum(0).to(torch.int32))


def weights_of(choice: RouterChoice, plan: ExpertsPlan) -> Tensor:
    """v [M, k], in the dtype of the shares."""
    values = choice.shares.gather(1, choice.chosen)
    return values / values.sum(-1, keepdim=True) if plan.renormalised else values


def router_gradient(dvalues: Tensor, choice: RouterChoice, plan: ExpertsPlan) -> Tensor:
    """The gradient of R h [M, E] from that of v [M, k]."""
    values = choice.shares.gather(1, choice.chosen)
    if plan.renormalised:
        total = values.sum(-1, keepdim=True)
        dvalues = (dvalues - (dvalues * values).sum(-1, keepdim=True) / total) / total
    dlogits = -choice.shares * (dvalues * values).sum(-1, keepdim=True)
    return dlogits.scatter_add_(1, choice.chosen, dvalues * values)


class ExpertsBlock(torch.autograd.Function):
    """See the module.

    Args of `apply`: the layer's half, the pass, x and δ [M, d]. Returns x' and δ' [M, d]; M is N, or U in
    the last layer.
    """

    @staticmethod
    def forward(
        ctx: Any, half: ExpertsHalf, call: Pass, x: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        total, h, inverse = half.begin.forward(x, delta, 0)
        choice = choose(h, half.router, half.plan.top)
        both = grouped(h[choice.position], half.gate_up, choice.ends)
        out = grouped(gated(both, half.plan.activation), half.down, choice.ends)
        out.mul_(weights_of(choice, half.plan).flatten()[choice.order, None].to(out.dtype))
        summed = choice.summed(out)
        added, out_inverse = half.end.forward(summed)
        if call.learn:
            saved = Saved(ctx)
            saved.add("total", total)
            saved.add("inverse", inverse)
            saved.add("chosen", choice.chosen)
            if call.keep.gate_up:
                saved.add("both", both)
            if out_inverse is not None:
                saved.add("out", summed)
                saved.add("out_inverse", out_inverse)
            saved.close()
            ctx.half = half
        return total, added

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dadded: Tensor) -> tuple[Any, ...]:
        half, saved = ctx.half, opened(ctx)
        total, inverse = saved["total"], saved["inverse"]
        h = half.begin.again(total, inverse, 0)
        choice = choose(h, half.router, half.plan.top, saved["chosen"])
        position = choice.position
        both = saved.get("both")
        if both is None:
            both = grouped(h[position], half.gate_up, choice.ends)
        dy = half.end.gradient(dadded, saved.get("out"), saved.get("out_inverse"))
        dactivated = grouped(dy[position], half.down, choice.ends, transposed=True)
        values = weights_of(choice, half.plan).flatten()[choice.order, None]
        dboth, activated = gated_gradient(
            dactivated * values.to(dactivated.dtype), both, half.plan.activation, again=True
        )
        wide = choice.shares.dtype
        assert activated is not None
        dpairs = (dactivated.to(wide) * activated.to(wide)).sum(-1)
        del dactivated, activated
        dvalues = torch.empty_like(dpairs).scatter_(0, choice.order, dpairs)
        dlogits = router_gradient(dvalues.view_as(choice.chosen), choice, half.plan)
        dinputs = grouped(dboth, half.gate_up, choice.ends, transposed=True)
        dh = choice.summed(dinputs) + dlogits.to(h.dtype) @ half.router
        dx = half.begin.gradient(dh, dtotal, total, inverse)
        return (None, None, *both_gradients(ctx, dx, 2))


def kept_bytes(sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool) -> int:
    """What the block leaves for its backward pass.

    A position: total d, 1/rms in float32, its experts in int64, and gate_up 2F of each of them.
    """
    plan, width, inner = _plan(layer), layer.qkv.inputs, layer.inner
    each = width * sizes.value + (4 if plan.before else 0) + 8 * plan.top
    if keep.gate_up:
        each += plan.top * 2 * inner * sizes.value
    if plan.after:
        each += width * sizes.value + 4
    return each * (load.asked if last else load.positions)


def forward_bytes(
    sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool
) -> int:
    """The most that lives beside what is kept: h, each pair's input, activation and output, the sum."""
    plan, width, inner = _plan(layer), layer.qkv.inputs, layer.inner
    pair = max(width + 2 * inner, inner + width, inner * (1 if sizes.kernels else 2), 2 * width)
    pair += 0 if keep.gate_up else 2 * inner
    each = (3 * width + plan.top * pair) * sizes.value + _routing(layer)
    return each * (load.asked if last else load.positions)


def backward_bytes(
    sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool
) -> int:
    """The most that lives beside what is kept: the gradients of x, δ and h, and of each pair's parts."""
    plan, width, inner = _plan(layer), layer.qkv.inputs, layer.inner
    terms = 0 if sizes.kernels else (2 if plan.activation == "silu" else 3) * inner
    pair = max(width + inner, 5 * inner + terms, 2 * inner + width, 2 * width)
    pair += 0 if keep.gate_up else 2 * inner
    each = (4 * width + plan.top * pair) * sizes.value + _routing(layer)
    return each * (load.asked if last else load.positions)


def _plan(layer: LayerSizes) -> ExpertsPlan:
    assert isinstance(layer.plan.mlp, ExpertsPlan)
    return layer.plan.mlp


def _routing(layer: LayerSizes) -> int:
    """Shares and logits of all experts in float32; order, positions and weights of the pairs."""
    plan = _plan(layer)
    return 3 * 4 * plan.experts + 32 * plan.top
