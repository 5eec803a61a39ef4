"""A causal language model over packed rows, with logits only where something is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.adapters.routing import BASE_ONLY, Slots, slots_of
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.kernels.logprob import token_logprobs
from mtl_lora_cli.models.attention import Segments
from mtl_lora_cli.models.blocks import Keep
from mtl_lora_cli.models.decoder import FusedDecoder, obstacle

Engine = Literal["auto", "fused", "plain"]


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
        engine: `fused` runs the layers as our blocks, `plain` as transformers wrote them; `auto` is
            fused where that is possible.
        keep: what the fused engine keeps for the backward pass.

    Raises:
        UsageError: `fused` was asked for and the model's layers are not of that kind.
    """

    def __init__(
        self,
        model: Any,
        adapter: Adapter | None = None,
        *,
        engine: Engine = "auto",
        keep: Keep | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._adapter = adapter
        self.keep = keep or Keep()
        self.decoder: FusedDecoder | None = None
        if engine != "plain":
            reason = obstacle(model, adapter)
            if reason is None:
                self.decoder = FusedDecoder(model, adapter)
            elif engine == "fused":
                raise UsageError(f"engine: fused does not know this model: {reason}")

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
        return token_logprobs(self._head(batch), batch.owner, batch.targets)

    def logits(self, batch: PackedBatch) -> Tensor:
        """Logits at the positions asked for and nowhere else, float32 [U, vocabulary]."""
        return self._head(batch).float()

    def _head(self, batch: PackedBatch) -> Tensor:
        chosen = self._hidden(batch)
        select = (
            nullcontext()
            if self._adapter is None
            else self._adapter.routing.select(batch.positions)
        )
        with select:
            return cast(Tensor, self.model.get_output_embeddings()(chosen))

    def _hidden(self, batch: PackedBatch) -> Tensor:
        """Normed hidden states at the positions asked for, [U, d]."""
        positions = batch.positions.to(batch.input_ids.device)
        if self.decoder is None:
            hidden = self.model.base_model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                segments=batch.segments,
            ).last_hidden_state[0]
            return cast(Tensor, hidden[positions])
        slots, chosen_slots = self._slots(batch)
        return self.decoder.forward(
            batch.input_ids,
            batch.position_ids,
            batch.segments,
            positions,
            slots,
            chosen_slots,
            training=self.training,
            keep=self.keep,
        )

    def _slots(self, batch: PackedBatch) -> tuple[Slots, Slots]:
        """The routing of all positions and of those asked for."""
        device = batch.input_ids.device
        if self._adapter is None:
            none = slots_of(torch.full_like(batch.task_ids, BASE_ONLY), device)
            return none, none
        routing = self._adapter.routing
        every = routing.slots(batch.task_ids.shape, device)
        with routing.select(batch.positions):
            return every, routing.slots(batch.positions.shape, device)
