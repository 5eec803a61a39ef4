"""Which experts a position asks: the choice of a router, and its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtl_lora_cli.adapters.pairs import Pairs
from mtl_lora_cli.engine.plan import RouterPlan


class RouterWeights(NamedTuple):
    """R [E, d], b [E] and c [E]; None where there is none."""

    weight: Tensor
    bias: Tensor | None
    correction: Tensor | None


class RouterChoice(NamedTuple):
    """Which experts each of M positions asks, and the pairs that are computed.

    Attributes:
        shares: p [M, E], float32 or better.
        pairs: of positions and experts.
    """

    shares: Tensor
    pairs: Pairs

    @property
    def chosen(self) -> Tensor:
        """int64 [M, k]."""
        return self.pairs.chosen


def choose(
    h: Tensor, weights: RouterWeights, plan: RouterPlan, pairs: Pairs | None = None
) -> RouterChoice:
    """The router's choice for h [M, d]; `pairs` where it was made before."""
    wide = torch.promote_types(h.dtype, torch.float32)
    dtype = wide if plan.wide else h.dtype
    bias = None if weights.bias is None else weights.bias.to(dtype)
    logits = torch.nn.functional.linear(h.to(dtype), weights.weight.to(dtype), bias).to(wide)
    shares = logits.softmax(-1) if plan.scores == "softmax" else logits.sigmoid()
    if pairs is None:
        pairs = Pairs.of(_best(shares, weights.correction, plan), plan.experts)
    return RouterChoice(shares, pairs)


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
