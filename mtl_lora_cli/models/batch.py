"""What one pass through the model takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtl_lora_cli.engine.segments import Segments


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
    """

    input_ids: Tensor
    position_ids: Tensor
    task_ids: Tensor
    segments: Segments
    positions: Tensor
    owner: Tensor
    targets: Tensor

    @property
    def owners(self) -> Tensor:
        """int64 [S] on the CPU: for each question the task of the position that answers it."""
        return self.task_ids.view(-1)[self.positions.cpu()[self.owner.cpu()]]

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on a device; task ids stay on the CPU, where routing reads them."""
        if device.type == "cpu":
            return self
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "position_ids", "owner", "targets")
        }
        return replace(self, segments=self.segments.to(device), **moved)
