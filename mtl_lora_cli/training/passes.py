"""One pass, forward and backward, and one update: launched kernel by kernel, or replayed as a graph.

A small model at short rows is bound by the time that launching takes, not by arithmetic, and a large
one still waits a tenth of its time. A CUDA graph launches a whole pass at once; it wants every tensor
at the same place and of the same size, so batches are padded to the size of a row and copied to fixed
buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.adapters.routing import BASE_ONLY, Slots
from mtl_lora_cli.models.attention import Segments
from mtl_lora_cli.models.packed import PackedBatch, PackedModel

_SEGMENT = 256  # positions of a segment of padding
_ROOM = 256  # questions and segments are padded to whole multiples of this
_MOST_TASKS = 64  # a graph computes the matrices of all tasks, present or not
_WARM_UP = 2  # passes and updates that run as they are: kernels are compiled, state gets its memory


@dataclass(frozen=True)
class Capacity:
    """The sizes that one graph serves: positions, questions, segments."""

    positions: int
    questions: int
    segments: int

    @classmethod
    def of(cls, batch: PackedBatch, positions: int) -> Capacity:
        """Of a batch whose rows hold at most `positions` tokens together."""
        padding = -(-(positions - batch.input_ids.numel()) // _SEGMENT)
        return cls(
            positions,
            _rounded(len(batch.positions)),
            _rounded(len(batch.segments.bounds) + padding),
        )


def _rounded(count: int) -> int:
    return -(-max(1, count) // _ROOM) * _ROOM


def padded(batch: PackedBatch, capacity: Capacity) -> PackedBatch:
    """The batch on the CPU, filled up: padding belongs to no task and is asked nothing.

    Questions are filled up with position 0 and token 0; give them the weight 0.
    """
    missing = capacity.positions - batch.input_ids.numel()
    lengths = [end - start for start, end in batch.segments.bounds]
    lengths += [_SEGMENT] * (missing // _SEGMENT)
    if missing % _SEGMENT:
        lengths.append(missing % _SEGMENT)
    places = torch.arange(missing) % _SEGMENT
    questions = capacity.questions - len(batch.positions)
    nothing = torch.zeros(questions, dtype=torch.long)
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, torch.zeros(1, missing, dtype=torch.long)], dim=1),
        position_ids=torch.cat([batch.position_ids, places.unsqueeze(0)], dim=1),
        task_ids=torch.cat(
            [batch.task_ids, torch.full((1, missing), BASE_ONLY, dtype=torch.long)], dim=1
        ),
        segments=Segments.build(lengths),
        positions=torch.cat([batch.positions, nothing]),
        owner=torch.arange(capacity.questions),
        targets=torch.cat([batch.targets, nothing]),
    )


Backward = Callable[[Tensor], None]


class EagerPasses:
    """Runs each pass as it comes.

    Args:
        model: what is called; it may wrap `packed`.
        packed: base model with the adapter injected.
        device: where it is.
        backward: how a loss is differentiated.
    """

    def __init__(
        self,
        model: Callable[[PackedBatch], Tensor],
        packed: PackedModel,
        device: torch.device,
        backward: Backward = torch.Tensor.backward,
    ) -> None:
        self._model, self._packed, self._device, self._backward = model, packed, device, backward

    def __call__(self, batch: PackedBatch, weights: Tensor) -> Tensor:
        """Add the gradient of −Σ_s w_s log p_s to the parameters' gradients.

        Args:
            batch: on the CPU.
            weights: w float32 [S], on the CPU.

        Returns:
            log p [S], on the device.
        """
        moved = batch.to(self._device)
        weights = weights.to(self._device, non_blocking=True)
        with self._packed.routed(moved):
            logprobs = self._model(moved)
            self._backward(-(logprobs * weights).sum())
        return logprobs.detach()


class GraphedPasses:
    """The same, replayed as CUDA graphs, one for each `Capacity` that turns up.

    The first passes run as they are; nothing differs but the padding. Where memory does not suffice
    for a graph, all do.

    Args:
        packed: base model with the adapter injected; its decoder is fused.
        adapter: what is trained.
        row_length: most tokens of a row; a batch of k rows is padded to k times that.
        eager: runs the passes that come before a graph exists.
    """

    def __init__(
        self, packed: PackedModel, adapter: Adapter, row_length: int, eager: EagerPasses
    ) -> None:
        self._packed, self._adapter, self._row_length = packed, adapter, row_length
        self._eager = eager
        self._graphs: dict[Capacity, _Graph] = {}
        self._passes = 0
        self._fits = True
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: PackedBatch, weights: Tensor) -> Tensor:
        """See `EagerPasses`."""
        count = len(batch.targets)
        rows = -(-batch.input_ids.numel() // self._row_length)
        capacity = Capacity.of(batch, rows * self._row_length)
        filled = padded(batch, capacity)
        weights = torch.cat([weights, weights.new_zeros(capacity.questions - count)])
        self._passes += 1
        if self._passes > _WARM_UP and self._fits and capacity not in self._graphs:
            self._capture(filled, weights, capacity)
        if capacity not in self._graphs:
            return self._eager(filled, weights)[:count]
        return self._graphs[capacity].replay(filled, weights)[:count]

    def _capture(self, batch: PackedBatch, weights: Tensor, capacity: Capacity) -> None:
        torch.cuda.empty_cache()  # a graph has memory of its own
        try:
            self._graphs[capacity] = _Graph(
                self._packed, self._adapter, batch, weights, capacity, self._pool
            )
        except torch.OutOfMemoryError:
            self._fits = False
            torch.cuda.empty_cache()


class _Graph:
    """One captured pass and the buffers that it reads."""

    def __init__(
        self,
        packed: PackedModel,
        adapter: Adapter,
        batch: PackedBatch,
        weights: Tensor,
        capacity: Capacity,
        pool: Any,
    ) -> None:
        device = next(iter(adapter.tensors().values())).device
        tables = {key: table.to(device) for key, table in self._tables(batch, capacity).items()}
        self._capacity = capacity
        moved = batch.to(device)
        self._batch = replace(
            moved,
            positions=batch.positions.to(device),
            segments=moved.segments.with_tables(tables),
        )
        self._tables_on_device = tables
        self._weights = weights.to(device)
        ids = batch.task_ids.view(-1)
        present = torch.arange(len(adapter.tasks), device=device)
        self._slots = [_all_tasks(present, own) for own in (ids, ids[batch.positions])]
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="relaxed"):
            logprobs = packed(self._batch, slots=(self._slots[0], self._slots[1]))
            (-(logprobs * self._weights).sum()).backward()
        self._logprobs = logprobs.detach()

    def replay(self, batch: PackedBatch, weights: Tensor) -> Tensor:
        """Copy a batch to the buffers and run."""
        ids = batch.task_ids.view(-1)
        own = self._batch
        pairs = [
            (own.input_ids, batch.input_ids),
            (own.position_ids, batch.position_ids),
            (own.positions, batch.positions),
            (own.targets, batch.targets),
            (self._weights, weights),
        ]
        for slots, values in zip(self._slots, (ids, ids[batch.positions]), strict=True):
            assert slots.active is not None
            pairs.append((slots.index, values.to(torch.int32)))
            pairs.append((slots.active, (values >= 0).unsqueeze(1)))
        tables = self._tables(batch, self._capacity)
        pairs += [(self._tables_on_device[key], tables[key]) for key in tables]
        for buffer, value in pairs:
            buffer.copy_(value.pin_memory(), non_blocking=True)
        self._graph.replay()
        return self._logprobs

    def _tables(self, batch: PackedBatch, capacity: Capacity) -> dict[tuple[int, bool], Tensor]:
        """Every tile table that the kernels may ask for, filled up."""
        from mtl_lora_cli.models.packing import table_keys

        return {
            (block, of_keys): batch.segments.tile_table(
                block,
                of_keys=of_keys,
                capacity=(capacity.positions + capacity.segments * (block - 1)) // block,
            )
            for block, of_keys in table_keys()
        }


def _all_tasks(present: Tensor, ids: Tensor) -> Slots:
    index = ids.to(torch.int32).to(present.device)
    return Slots(present, index, (index >= 0).unsqueeze(1), all_tasks=True)


def graphs_possible(packed: PackedModel, adapter: Adapter, device: torch.device) -> bool:
    """Whether passes can be captured: nothing in them may ask the CPU anything."""
    return (
        device.type == "cuda"
        and packed.decoder is not None
        and packed.decoder.fixed_shapes(device)
        and len(adapter.tasks) <= _MOST_TASKS
        and not packed.head_is_adapted  # its routing is looked up on the CPU
    )


def make_optimizer(
    parameters: Sequence[Tensor], learning_rate: float, weight_decay: float, *, graphed: bool
) -> torch.optim.AdamW:
    """AdamW; on a card in one kernel for all parameters, and such that a graph can hold it."""
    on_card = parameters[0].is_cuda
    rate: float | Tensor = learning_rate
    if graphed:
        rate = torch.tensor(learning_rate, device=parameters[0].device)
    return torch.optim.AdamW(
        parameters,
        lr=rate,
        weight_decay=weight_decay,
        fused=True if on_card else None,
        capturable=graphed,
    )


class Update:
    """Clip the gradients, step, and set them to zero; as a graph where the passes are graphs.

    Args:
        parameters: what is trained.
        optimizer: with `capturable` state and a tensor as learning rate where `graphed`.
        max_norm: of all gradients together.
        graphed: replay from the third step on.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        max_norm: float,
        *,
        graphed: bool,
    ) -> None:
        self._parameters = list(parameters)
        self._optimizer = optimizer
        self._max_norm = max_norm
        self._graphed = graphed
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._norm: Tensor | None = None

    def __call__(self, learning_rate: float) -> Tensor:
        """One update at this learning rate.

        Returns:
                The norm of the gradients before clipping. Where it is no finite number, neither are
            the parameters any more.
        """
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        self._steps += 1
        if not self._graphed or self._steps <= _WARM_UP:
            return self._run()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph):
                self._norm = self._run()
        self._graph.replay()
        assert self._norm is not None
        return self._norm

    def _run(self) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=not self._graphed)
        return norm
