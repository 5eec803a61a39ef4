"""One pass, forward and backward: launched kernel by kernel, or replayed as a graph.

A small model at short rows is bound by the time that launching takes, not by arithmetic, and a large
one still waits a tenth of its time. A CUDA graph launches a whole pass at once; it wants every tensor
at the same place and of the same size, so batches are padded to the size of a row and copied to fixed
buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.adapters.routing import Slots
from mtl_lora_cli.engine import aside
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.kernels.runs import Runs, most_pieces, runs_of
from mtl_lora_cli.kernels.trees import KeyParts, Trees, slots_of
from mtl_lora_cli.machine import threads
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.host import Batch, Host, at_fault, require_losses
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.training.capacity import SEGMENT, Capacity, PassSizes, padded, slot_table
from mtl_lora_cli.training.update import gradients_of

ASIDE = 2**24  # positions times features up to which adapters' own gradients run beside the rest
_WARM_UP = 2  # passes that run as they are: kernels are compiled, gradients get their memory


@dataclass(frozen=True)
class Ready:
    """A pass of which all that the CPU has to do is done.

    Attributes:
        batch, weights: on the CPU, filled up where a graph will run it.
        count: questions before filling up.
        capacity: of the graph; None for a pass that runs as it is.
        staged: what goes into the graph's buffers, in their order, in pinned memory.
    """

    batch: Any
    weights: Tensor
    count: int
    capacity: Capacity | None = None
    staged: tuple[Tensor, ...] = ()


class EagerPasses:
    """Runs each pass as it comes.

    Args:
        losses: gives ℓ [S] of a batch; it may wrap the host's.
        host: the model with the adapter injected.
        device: where it is.

    Attributes:
        captures: graphs that were captured so far: none.
    """

    captures = 0

    def __init__(self, losses: Callable[[Any], Tensor], host: Host, device: torch.device) -> None:
        self._losses, self._host, self._device = losses, host, device
        self._own = isinstance(host, PackedModel)

    def prepare(self, batch: Batch, weights: Tensor) -> Ready:
        """What can be done while a card is busy with the pass before.

        Args:
            batch: on the CPU.
            weights: w float32 [S], on the CPU.
        """
        return Ready(batch, weights, len(weights))

    def run(self, ready: Ready) -> Tensor:
        """Add the gradient of Σ_s w_s ℓ_s to the parameters' gradients.

        Returns:
            ℓ [S], on the device.
        """
        threads.look(self._device)
        moved = ready.batch.to(self._device)
        weights = ready.weights.to(self._device, non_blocking=True)
        with self._host.routed(moved):
            with nullcontext() if self._own else at_fault(type(self._host)):
                losses = self._losses(moved)
            require_losses(self._host, losses, len(weights))
            (losses * weights).sum().backward()
        return losses.detach()[: ready.count]


class GraphedPasses:
    """The same, replayed as CUDA graphs, one for each `Capacity` that turns up: as a rule one for all rows.

    The first passes run as they are; nothing differs but the padding. So do those with an example beyond
    the positions from which on a rotary embedding is another one, those whose pictures enter deeper layers or see
    themselves, and, where memory does not suffice for a graph, all. Of other pictures the tower runs as it comes, and
    the graph begins behind it.

    Args:
        packed: base model with the adapter injected; its decoder is fused.
        adapter: what is trained.
        sizes: of the run's passes.
        eager: runs the passes that come before a graph exists.

    Attributes:
        captures: graphs that were captured so far.
    """

    def __init__(
        self, packed: PackedModel, adapter: Adapter, sizes: PassSizes, eager: EagerPasses
    ) -> None:
        assert packed.decoder is not None
        self._packed, self._adapter, self._sizes = packed, adapter, sizes
        self._tables = packed.decoder.tables()
        self._limit = packed.decoder.plan.limit
        self._eager = eager
        self._graphs: dict[Capacity, _Graph] = {}
        self._passes = 0
        self._fits = True
        self._pool = torch.cuda.graph_pool_handle()
        self.captures = 0

    def prepare(self, batch: Batch, weights: Tensor) -> Ready:
        """See `EagerPasses.prepare`."""
        assert isinstance(batch, PackedBatch), "graphs are the text host's"
        grid = None if batch.pictures is None else batch.pictures.grid
        if grid is not None or batch.segments.blocks is not None:
            return self._eager.prepare(batch, weights)
        if self._limit is not None and max(batch.segments.longest, SEGMENT) > self._limit:
            return self._eager.prepare(batch, weights)
        count = len(batch.targets)
        capacity = self._sizes.capacity(batch)
        filled = padded(batch, capacity)
        weights = torch.cat([weights, weights.new_zeros(capacity.questions - count)])
        contents = _contents(filled, weights, capacity, self._sizes.tasks, self._tables)
        staged = tuple(value.pin_memory() for value in contents)
        return Ready(filled, weights, count, capacity, staged)

    def run(self, ready: Ready) -> Tensor:
        """See `EagerPasses.run`."""
        self._passes += 1
        capacity = ready.capacity
        if capacity is None:
            return self._eager.run(ready)
        if self._passes > _WARM_UP and self._fits and capacity not in self._graphs:
            self._capture(ready, capacity)
        if capacity not in self._graphs:
            return self._eager.run(ready)
        return self._graphs[capacity].replay(ready)[: ready.count]

    def _capture(self, ready: Ready, capacity: Capacity) -> None:
        torch.cuda.empty_cache()  # a graph has memory of its own
        try:
            self._graphs[capacity] = _Graph(
                self._packed, self._adapter, ready, self._pool, self._tables
            )
            self.captures += 1
        except torch.OutOfMemoryError:
            self._fits = False
            torch.cuda.empty_cache()


class _Graph:
    """One captured pass and the buffers that it reads."""

    def __init__(
        self,
        packed: PackedModel,
        adapter: Adapter,
        ready: Ready,
        pool: Any,
        keys: Sequence[tuple[int, bool]],
    ) -> None:
        assert packed.decoder is not None
        device = adapter.device
        self._buffers = [value.to(device) for value in ready.staged]
        own = dict(zip(_NAMES, self._buffers, strict=False))
        batch = replace(
            ready.batch.to(device),
            segments=_segments(ready.batch.segments, self._buffers[len(_NAMES) :], keys),
            **{name: own[name] for name in ("input_ids", "position_ids", "positions", "targets")},
        )
        every, chosen = slots_in(own, all_tasks=ready.capacity is None or not ready.capacity.slots)
        assert packed.decoder is not None
        self._packed, self._x, self._dx = packed, None, None
        if batch.pictures is not None:
            x = packed.embedded(batch)[0]
            self._x = x.detach().clone().requires_grad_(x.requires_grad)
            batch = replace(batch, pictures=None, embeddings=self._x)
        parameters = list(adapter.trained().values())
        gradients_of(parameters)  # their memory is not the graph's own
        self._held = (batch, every, chosen)  # the graph reads their memory, too
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        small = batch.input_ids.numel() * packed.decoder.width <= ASIDE
        beside = aside.Aside(device) if small else None
        capturing = torch.cuda.graph(self._graph, pool=pool, capture_error_mode="relaxed")
        with capturing, aside.opened(beside):
            losses = -packed(batch, slots=(every, chosen))
            self._dx = add_gradients((losses * own["weights"]).sum(), parameters, self._x)
        self._losses = losses.detach()

    def replay(self, ready: Ready) -> Tensor:
        """Copy a batch to the buffers and run."""
        for buffer, value in zip(self._buffers, ready.staged, strict=True):
            buffer.copy_(value, non_blocking=True)
        x = None
        if self._x is not None:
            x, _ = self._packed.embedded(ready.batch.to(self._x.device))
            self._x.data.copy_(x.detach())
        self._graph.replay()
        if x is not None and self._dx is not None:
            x.backward(self._dx)
        return self._losses


def add_gradients(
    loss: Tensor, parameters: Sequence[Tensor], x: Tensor | None = None
) -> Tensor | None:
    """The same as `loss.backward()`, bit by bit: all additions together in a few launches, not one each.

    Args:
        loss: a scalar.
        parameters: all that is trained; each has a gradient already.
        x: what else the loss follows from.

    Returns:
        The gradient of x, where it asks for one.
    """
    also = [x] if x is not None and x.requires_grad else []
    *found, dx = (*torch.autograd.grad(loss, [*parameters, *also], allow_unused=True), None)
    if also:
        dx = found.pop()
    aside.join()
    own = gradients_of(parameters)
    pairs = [(one, new) for one, new in zip(own, found, strict=True) if new is not None]
    torch._foreach_add_([one for one, _ in pairs], [new for _, new in pairs])
    return dx


# What a graph reads, in the order of `_contents`; the tile tables follow.
_NAMES = (
    "input_ids",
    "position_ids",
    "positions",
    "targets",
    "weights",
    "present",
    "every_index",
    "every_active",
    "every_pieces",
    "every_ends",
    "chosen_index",
    "chosen_active",
    "chosen_pieces",
    "chosen_ends",
)


def _contents(
    batch: PackedBatch,
    weights: Tensor,
    capacity: Capacity,
    tasks: int,
    tables: Sequence[tuple[int, bool]],
) -> list[Tensor]:
    found = [batch.input_ids, batch.position_ids, batch.positions, batch.targets, weights]
    found += routed(batch, tasks, capacity)
    return [*found, *_tables(batch.segments, capacity, tables)]


def routed(batch: PackedBatch, tasks: int, capacity: Capacity) -> list[Tensor]:
    """What `slots_in` reads: the tasks of the slots; the slot of every position, whether it has one, and their runs;
    the same of those that are asked."""
    ids = batch.task_ids.view(-1)
    present, places = slot_table(ids, tasks, capacity.slots)
    found = [present]
    for own in (ids, ids[batch.positions]):
        index = places[own]
        most = most_pieces(len(own), capacity.segments)
        found += [index, (own >= 0).unsqueeze(1), *runs_of(index, len(present), most)]
    return found


def slots_in(own: Mapping[str, Tensor], *, all_tasks: bool) -> tuple[Slots, Slots]:
    """The routing of all positions, and of those that are asked, from tensors by their names in `_NAMES`."""
    every, chosen = (
        Slots(
            own["present"],
            own[f"{name}_index"],
            own[f"{name}_active"],
            all_tasks=all_tasks,
            make_runs=partial(Runs, own[f"{name}_pieces"], own[f"{name}_ends"]),
        )
        for name in ("every", "chosen")
    )
    return every, chosen


def _tables(
    segments: Segments, capacity: Capacity, keys: Sequence[tuple[int, bool]]
) -> list[Tensor]:
    """What says where the segments lie, filled up: `_segments` reads it."""
    trees = segments.trees
    found: list[Tensor] = []
    for block, of_keys in keys:
        if of_keys and trees is not None:
            found += segments.key_parts(block, capacity.segments)[:2]
        else:
            most = (capacity.positions + capacity.segments * (block - 1)) // block
            found.append(segments.tile_table(block, of_keys=of_keys, capacity=most))
    return [*found, *(trees or ())]


def _segments(
    segments: Segments, buffers: Sequence[Tensor], keys: Sequence[tuple[int, bool]]
) -> Segments:
    """The segments as the buffers of `_tables` say them."""
    if segments.reach is None:
        return segments.ready(dict(zip(keys, buffers, strict=True)))
    left = iter(buffers)
    tables: dict[tuple[int, bool], Tensor] = {}
    parts: dict[int, KeyParts] = {}
    for block, of_keys in keys:
        if of_keys:
            parts[block] = KeyParts(next(left), next(left), slots_of(len(segments.reach)))
        else:
            tables[block, of_keys] = next(left)
    return segments.ready(tables, Trees(*left), parts)


def graphs_possible(packed: Host, device: torch.device) -> bool:
    """Whether passes can be captured: nothing in them may ask the CPU anything."""
    return (
        device.type == "cuda"
        and isinstance(packed, PackedModel)
        and packed.decoder is not None
        and packed.decoder.fixed_shapes()
        and not packed.head_is_adapted  # its routing is looked up on the CPU
    )
