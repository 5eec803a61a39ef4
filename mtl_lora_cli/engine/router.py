"""Which experts a position asks: the choice of a router, and its gradient.

Pairs of a position and an expert that it asks are sorted by their experts, so that each expert is one
product, or all are one grouped product (`kernels/grouped.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtl_lora_cli.engine.plan import RouterPlan


class RouterWeights(NamedTuple):
    """R [E, d], b [E] and c [E]; None where there is none."""

    weight: Tensor
    bias: Tensor | None
    correction: Tensor | None


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

    @property
    def expert(self) -> Tensor:
        """Of each pair, int64 [S], ascending."""
        return self.sorted(self.chosen)

    def sorted(self, values: Tensor) -> Tensor:
        """[M, k] in the order of the pairs, [S]."""
        return values.flatten()[self.order]

    def back(self, pairs: Tensor) -> Tensor:
        """[S] in the order of the positions, [M, k]."""
        return torch.empty_like(pairs).scatter_(0, self.order, pairs).view_as(self.chosen)

    def summed(self, pairs: Tensor) -> Tensor:
        """The sum over each position's pairs, [S, d] → [M, d]; always in the same order."""
        places = torch.arange(len(self.order), device=self.order.device)
        return pairs[self.back(places).flatten()].view(*self.chosen.shape, -1).sum(1)


def choose(
    h: Tensor, weights: RouterWeights, plan: RouterPlan, chosen: Tensor | None = None
) -> RouterChoice:
    """The router's choice for h [M, d]; `chosen` where it was made before."""
    wide = torch.promote_types(h.dtype, torch.float32)
    dtype = wide if plan.wide else h.dtype
    bias = None if weights.bias is None else weights.bias.to(dtype)
    logits = torch.nn.functional.linear(h.to(dtype), weights.weight.to(dtype), bias).to(wide)
    shares = logits.softmax(-1) if plan.scores == "softmax" else logits.sigmoid()
    if chosen is None:
        chosen = _best(shares, weights.correction, plan)
    experts, order = chosen.flatten().sort(stable=True)
    counts = torch.zeros(plan.experts, dtype=torch.int64, device=h.device)
    counts.scatter_add_(0, experts, torch.ones_like(experts))
    return RouterChoice(shares, chosen, order, counts.cumsum(0).to(torch.int32))


def _best(shares: Tensor, correction: Tensor | None, plan: RouterPlan) -> Tensor:
    """T of each position, int64 [M, k]."""
    ranking = shares if correction is None else shares + correction
    if plan.top_groups < plan.groups:
        parts = ranking.unflatten(-1, (plan.groups, -1))
        best = parts.topk(2, dim=-1).values.sum(-1).topk(plan.top_groups, dim=-1).indices
        asked = torch.zeros_like(parts[..., 0], dtype=torch.bool).scatter_(-1, best, True)
        ranking = parts.masked_fill(~asked.unsqueeze(-1), -torch.inf).flatten(-2)
    return ranking.topk(plan.top, dim=-1).indices


def weights_of(choice: RouterChoice, plan: RouterPlan) -> Tensor:
    """v [M, k], in the dtype of the shares."""
    values = choice.shares.gather(1, choice.chosen)
    if plan.renormalised:
        values = values / (values.sum(-1, keepdim=True) + plan.epsilon)
    return values if plan.factor == 1.0 else values * plan.factor


def router_gradient(weighted: Tensor, choice: RouterChoice, plan: RouterPlan) -> Tensor:
    """The gradient of R h + b, [M, E].

    Args:
        weighted: v_e times its gradient, [M, k]: the gradient of log v.
        choice: the router's.
        plan: its own.
    """
    shares = choice.shares.gather(1, choice.chosen)
    whole = weighted.sum(-1, keepdim=True)
    if plan.renormalised:
        weighted = weighted - whole * shares / (shares.sum(-1, keepdim=True) + plan.epsilon)
    if plan.scores == "sigmoid":
        weighted = weighted * (1 - shares)
    others = plan.scores == "softmax" and not plan.renormalised
    rest = -choice.shares * whole if others else torch.zeros_like(choice.shares)
    return rest.scatter_add_(1, choice.chosen, weighted)


def router_input_gradient(dlogits: Tensor, weights: RouterWeights, like: Tensor) -> Tensor:
    """dh [M, d] from the gradient of R h + b [M, E], in the dtype of `like`."""
    return dlogits.to(like.dtype) @ weights.weight
