"""gpt-oss's gated activation, over a buffer in which gate and up are neighbours: g₀, u₀, g₁, u₁, …

    g' = min(g, c),   u' = min(max(u, −c), c),   a = (u' + 1) ⊙ g' σ(α g')

`expert_gate.py` has its kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clamped:
    """The activation's two numbers.

    Attributes:
        alpha: α.
        limit: c.
    """

    alpha: float
    limit: float


def clamped(both: Tensor, how: Clamped) -> Tensor:
    """a [N, f] from [g₀, u₀, g₁, …] [N, 2f]."""
    gate, up = _within(both, how)
    return (up + 1) * (gate * torch.sigmoid(how.alpha * gate))


def clamped_gradient(da: Tensor, both: Tensor, how: Clamped) -> tuple[Tensor, Tensor]:
    """The gradient of [g₀, u₀, g₁, …] [N, 2f] from da [N, f], and a once more [N, f].

    dg = da (u' + 1) σ (1 + α g' (1 − σ)) where g ≤ c,   du = da g' σ where |u| ≤ c,   with σ = σ(α g').
    """
    gate, up = _within(both, how)
    sigmoid = torch.sigmoid(how.alpha * gate)
    active = gate * sigmoid
    dgate = da * (up + 1) * sigmoid * (1 + how.alpha * (gate - active))
    gradient = torch.empty_like(both)
    gradient[:, ::2] = torch.where(both[:, ::2] <= how.limit, dgate, 0.0)
    gradient[:, 1::2] = torch.where(both[:, 1::2].abs() <= how.limit, da * active, 0.0)
    return gradient, (up + 1) * active


def _within(both: Tensor, how: Clamped) -> tuple[Tensor, Tensor]:
    """g' and u'."""
    gate, up = both[:, ::2], both[:, 1::2]
    return gate.clamp(max=how.limit), up.clamp(-how.limit, how.limit)
