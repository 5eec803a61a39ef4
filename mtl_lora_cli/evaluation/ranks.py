"""Sharing examples among processes: each takes some, and all know everything in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


@dataclass(frozen=True)
class Shard:
    """This process among those that share the work; by default it is alone.

    Attributes:
        rank: its number.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of_group(cls) -> Shard:
        """Its place in torch.distributed's default group, alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, costs: Sequence[int]) -> list[int]:
        """The numbers of what this process does: dealt out one by one, the costliest first."""
        return sorted(range(len(costs)), key=lambda i: (-costs[i], i))[self.rank :: self.count]

    def gather(self, own: Mapping[int, Value]) -> list[Value]:
        """What all processes found, in the order of its numbers; each of them has to call it.

        Args:
            own: number → what this process found; numpy arrays and lists, which can be sent.
        """
        found = dict(own)
        if self.count > 1:
            parts: list[Any] = [None] * self.count
            dist.all_gather_object(parts, found)
            found = {number: value for part in parts for number, value in part.items()}
        return [found[number] for number in range(len(found))]


ALONE = Shard()
