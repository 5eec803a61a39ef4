"""What one pass through the model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.kernels.backend import moved


@dataclass(frozen=True)
class Pictures:
    """The pictures of a pass.

    Attributes:
        seen: of each what the tower takes, by the names of its arguments.
        counts: of each how many tokens it has.
        places: int64 [K], the positions of their tokens, in the same order.
        grid: int64 [G, 1, N], the positions of all tokens where they have several dimensions; None: they have one.
    """

    seen: Sequence[Mapping[str, Tensor]]
    counts: Sequence[int]
    places: Tensor
    grid: Tensor | None = None

    def to(self, device: torch.device) -> Pictures:
        """On a device."""
        moved = [
            {name: value.to(device, non_blocking=True) for name, value in one.items()}
            for one in self.seen
        ]
        places = self.places.to(device, non_blocking=True)
        grid = None if self.grid is None else self.grid.to(device, non_blocking=True)
        return replace(self, seen=moved, places=places, grid=grid)

    def within(self, positions: Tensor) -> list[Mapping[str, Tensor]]:
        """Those whose tokens stand among these positions, int64 [P] on the CPU."""
        inside = torch.isin(self.places.cpu(), positions)
        starts = torch.tensor([0, *self.counts]).cumsum(0)[:-1]
        return [one for one, held in zip(self.seen, inside[starts].tolist(), strict=True) if held]


@dataclass(frozen=True)
class PackedBatch:
    """One pass through the model: N tokens of many examples behind each other.

    Attributes:
        input_ids, position_ids: int64 [1, N]; positions restart in every segment.
        task_ids: int64 [1, N] on the CPU; -1 is the base model alone.
        segments: bounds of the examples.
        positions: int64 [U], where the head is applied.
        owner: int64 [S], for each question the index in `positions` that answers it.
        targets: int64 [S], the token whose log-probability is asked.
        pictures: what stands in the places of picture tokens; None: there are none.
        embeddings: [N, d], what the layers begin with, where it lies ready.
    """

    input_ids: Tensor
    position_ids: Tensor
    task_ids: Tensor
    segments: Segments
    positions: Tensor
    owner: Tensor
    targets: Tensor
    pictures: Pictures | None = None
    embeddings: Tensor | None = None

    @property
    def owners(self) -> Tensor:
        """int64 [S] on the CPU: for each question the task of the position that answers it."""
        return self.task_ids.view(-1)[self.positions.cpu()[self.owner.cpu()]]

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on a device; task ids stay on the CPU, where routing reads them.

        Nobody waits for a card that is still busy with the pass before.
        """
        if device.type == "cpu":
            return self
        own = {
            name: moved(getattr(self, name), device)
            for name in ("input_ids", "position_ids", "owner", "targets")
        }
        shown = None if self.pictures is None else self.pictures.to(device)
        return replace(self, segments=self.segments.to(device), pictures=shown, **own)
