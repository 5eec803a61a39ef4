"""A causal language model over packed rows, with logits only where something is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.models.attention import Segments


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

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on a device; task ids stay on the CPU, where routing reads them."""
        if device.type == "cpu":
            return self
        s = self.segments
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "position_ids", "owner", "targets")
        }
        segments = replace(
            s,
            query_bounds=s.query_bounds.to(device),
            key_bounds=s.key_bounds.to(device),
            key_index=None if s.key_index is None else s.key_index.to(device),
        )
        return replace(self, segments=segments, **moved)


class PackedModel(nn.Module):
    """Base model and adapter as one module: a batch in, log-probabilities out.

    Args:
        model: a transformers causal language model loaded with our packed attention.
        adapter: the adapter that was injected into it, or None for the base model alone.
    """

    def __init__(self, model: Any, adapter: Adapter | None = None) -> None:
        super().__init__()
        self.model = model
        self._adapter = adapter

    @contextmanager
    def routed(self, batch: PackedBatch) -> Iterator[None]:
        """Route by the batch's task ids; keep forward and backward pass inside."""
        if self._adapter is None:
            yield
        else:
            with self._adapter.routing.assign(batch.task_ids):
                yield

    def forward(self, batch: PackedBatch) -> Tensor:
        """log p(targets[i] | what stands before it), float32 [S]."""
        logits = self.logits(batch)
        normaliser = torch.logsumexp(logits, dim=-1)
        return logits[batch.owner, batch.targets] - normaliser[batch.owner]

    def logits(self, batch: PackedBatch) -> Tensor:
        """Logits at the positions asked for and nowhere else, float32 [U, vocabulary]."""
        hidden = self.model.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            segments=batch.segments,
        ).last_hidden_state[0]
        chosen = hidden[batch.positions.to(hidden.device)]
        select = (
            nullcontext()
            if self._adapter is None
            else self._adapter.routing.select(batch.positions)
        )
        with select:
            return cast(Tensor, self.model.get_output_embeddings()(chosen).float())
