"""Pairs of a position and an expert that it asks, sorted by their experts.

So each expert is one product, or all are one grouped product (`kernels/grouped.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mtl_lora_cli.adapters.routing import Slots
from mtl_lora_cli.kernels.row_sums import row_sums


class Pairs(NamedTuple):
    """S = M k pairs of M positions.

    Attributes:
        order: int64 [S], pairs (position · k + place) sorted by expert.
        ends: int32 [E], where each expert's pairs end.
        chosen: int64 [M, k], the experts that each position asks.
    """

    order: Tensor
    ends: Tensor
    chosen: Tensor

    @staticmethod
    def of(chosen: Tensor, experts: int) -> Pairs:
        """From the experts asked by each position, int64 [M, k]."""
        sorted_experts, order = chosen.flatten().sort(stable=True)
        counts = torch.zeros(experts, dtype=torch.int64, device=chosen.device)
        counts.scatter_add_(0, sorted_experts, torch.ones_like(sorted_experts))
        return Pairs(order, counts.cumsum(0).to(torch.int32), chosen)

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
        return row_sums(pairs, self.back(places))

    def summed_exactly(self, pairs: Tensor) -> Tensor:
        """`summed`, in plain torch: gradients flow through."""
        places = torch.arange(len(self.order), device=self.order.device)
        return pairs[self.back(places).flatten()].view(*self.chosen.shape, -1).sum(1)

    def slots(self, slots: Slots, *, each: bool) -> Slots:
        """The routing of the pairs, from that of the positions.

        With `each` a pair's slot is expert · P + its task's, of P tasks present.
        """
        index = slots.index[self.position]
        if each:
            own = self.expert * slots.count + index
            index = torch.where(index >= 0, own, -1).to(torch.int32)
        active = None if slots.active is None else slots.active[self.position]
        return replace(slots, index=index, active=active, make_runs=None)
