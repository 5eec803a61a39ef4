"""Up-projections that a gate weighs anew for each token: what lies between A and B then.

    u_i = softmax(z″ / τ)_i z′        z = [z′; z″], z′ [r], z″ [n]

z and u of several projections stand side by side, each filled up with zeros (`function.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_lora_cli.kernels.mix import filled_up


@dataclass(frozen=True)
class TokenGate:
    """See the module.

    Attributes:
        ranks: r of each of the J projections.
        ups, temperature: n and τ.
    """

    ranks: tuple[int, ...]
    ups: int
    temperature: float

    def spread(self, z: Tensor, width: int) -> Tensor:
        """u [N, J·width] from z [N, J·k], in float32 or better."""
        each = [
            filled_up((gate.unsqueeze(-1) * low.unsqueeze(2)).flatten(2), width)
            for low, gate in self._parts(z)
        ]
        return torch.cat(each, dim=1).flatten(1)

    def gradient(self, du: Tensor, z: Tensor) -> Tensor:
        """dz [N, J·k] from du [N, J·m], in z's dtype."""
        each, found = self._of_one_rank(du), []
        for (own, rank), (low, gate) in zip(each, self._parts(z), strict=True):
            dgated = own[..., : self.ups * rank].unflatten(2, (self.ups, rank))  # [N, J', n, r]
            dlow = (gate.unsqueeze(-1) * dgated).sum(2)
            dgate = (dgated * low.unsqueeze(2)).sum(-1)
            dlogits = gate * (dgate - (gate * dgate).sum(-1, keepdim=True)) / self.temperature
            dz = torch.cat([dlow, dlogits], dim=-1)
            found.append(filled_up(dz, z.shape[1] // len(self.ranks)))
        return torch.cat(found, dim=1).flatten(1).to(z.dtype)

    def _parts(self, z: Tensor) -> list[tuple[Tensor, Tensor]]:
        """z′ [N, J', r] and the gates [N, J', n] of projections of one rank, in float32 or better."""
        wide = z.to(torch.float64 if z.dtype == torch.float64 else torch.float32)
        return [
            (
                own[..., :rank],
                torch.softmax(own[..., rank : rank + self.ups] / self.temperature, dim=-1),
            )
            for own, rank in self._of_one_rank(wide)
        ]

    def _of_one_rank(self, each: Tensor) -> list[tuple[Tensor, int]]:
        """[N, J·w] in pieces [N, J', w] of projections of one rank, and that rank."""
        each = each.unflatten(1, (len(self.ranks), -1))
        if len(set(self.ranks)) == 1:
            return [(each, self.ranks[0])]
        return list(zip(each.split(1, dim=1), self.ranks, strict=True))
