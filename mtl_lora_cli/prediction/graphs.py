"""Passes of a narrow model, replayed as CUDA graphs.

A pass of a hundred million weights takes longer to be launched than to be computed, and longest where other processes
have the cores. A graph is launched at once. It wants every tensor at the same place and of the same size: sizes are
filled up to whole multiples of a few, so that some graphs serve all passes of a job, and to the same ones whenever a pass
comes again. Before a graph is there a pass runs as it is, with the same kernels over the same tensors.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtl_lora_cli.adapters.routing import BASE_ONLY, Slots
from mtl_lora_cli.kernels.runs import Runs, runs_of
from mtl_lora_cli.kernels.trees import Trees
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.packed import PackedModel

_POSITIONS, _ASKED, _ROWS = (
    4096,
    2048,
    4096,
)  # sizes, and rows of tables, are whole multiples of these
_SEGMENT = 256  # positions of a segment of padding
_NARROW = 2**36  # positions times features²: beyond, a card computes longer than it takes to launch
_GRAPHS = 16  # as many have room
_FIELDS = ("input_ids", "position_ids", "positions", "owner", "targets")


class _Sizes(NamedTuple):
    """What a graph serves: numbers of positions, of those that are asked, of questions, and of rows in tables."""

    positions: int
    asked: int
    questions: int
    present: int
    pieces: tuple[int, int]
    tiles: tuple[int, ...]
    trees: bool


class Graphs:
    """The model as a function of passes.

    Args:
        packed: on a card; see `possible`.
        capture: whether passes that come again are captured; otherwise each is launched.
    """

    def __init__(self, packed: PackedModel, *, capture: bool = True) -> None:
        assert packed.decoder is not None
        self._packed, self._capture = packed, capture
        self._device = next(packed.model.parameters()).device
        self._limit, self._width = packed.decoder.plan.limit, packed.decoder.width
        self._blocks = [block for block, of_keys in packed.decoder.tables() if not of_keys]
        self._seen: set[_Sizes] = set()
        self._graphs: dict[_Sizes, _Graph] = {}
        self._fits = True
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)
            self._pool = torch.cuda.graph_pool_handle()

    @staticmethod
    def possible(packed: PackedModel, device: torch.device) -> bool:
        """Whether passes can be captured: nothing in them may ask the CPU anything."""
        return (
            device.type == "cuda"
            and packed.decoder is not None
            and packed.decoder.fixed_shapes()
            and not packed.head_is_adapted
        )

    def serves(self, batch: PackedBatch) -> bool:
        """Whether a pass may go this way."""
        segments = batch.segments
        if batch.pictures is not None or segments.blocks is not None:
            return False
        if self._limit is not None and max(segments.longest, _SEGMENT) > self._limit:
            return False
        narrow = batch.input_ids.numel() * self._width**2 <= _NARROW
        return narrow and bool((batch.task_ids != BASE_ONLY).all())

    def __call__(self, batch: PackedBatch) -> Tensor:
        """log p of the questions, float32 [S], on the card, until the next call.

        Args:
            batch: on the CPU; the graphs serve it.
        """
        count = len(batch.targets)
        filled, sizes, contents = _ready(batch, self._blocks)
        cuda = self._device.type == "cuda"
        staged = [value.pin_memory() if cuda else value for value in contents]
        known = self._graphs.get(sizes)
        if known is not None:
            return known.replay(staged)[:count]
        there = [value.to(self._device, non_blocking=True) for value in staged]
        asked = _asked(filled, there, self._blocks)
        if sizes in self._seen and self._capture and self._fits and len(self._graphs) < _GRAPHS:
            self._record(sizes, there, asked)
        self._seen.add(sizes)
        known = self._graphs.get(sizes)
        return (known.replay(staged) if known is not None else self._launched(asked))[:count]

    def _launched(self, asked: tuple[PackedBatch, tuple[Slots, Slots]]) -> Tensor:
        batch, slots = asked
        with self._packed.routed(batch):
            return self._packed(batch, slots=slots)

    def _record(self, sizes: _Sizes, there: list[Tensor], asked: Any) -> None:
        """Capture a pass, while the card is busy with those before it: `torch.cuda.graph` would wait for them."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
            try:
                values = self._launched(asked)
                graph.capture_end()
                self._graphs[sizes] = _Graph(graph, there, values, asked)
            except torch.OutOfMemoryError:
                self._fits = False
                with suppress(RuntimeError):  # of a capture that came to nothing
                    graph.capture_end()
                torch.cuda.empty_cache()


class _Graph(NamedTuple):
    """A captured pass, what it reads and where it writes; it holds the memory of all that."""

    graph: torch.cuda.CUDAGraph
    buffers: list[Tensor]
    values: Tensor
    held: Any

    def replay(self, staged: list[Tensor]) -> Tensor:
        """Copy a pass there and run."""
        for buffer, value in zip(self.buffers, staged, strict=True):
            buffer.copy_(value, non_blocking=True)
        self.graph.replay()
        return self.values


def _ready(batch: PackedBatch, blocks: list[int]) -> tuple[PackedBatch, _Sizes, list[Tensor]]:
    """A pass filled up, its sizes, and all that a card reads of it, in the order of `_asked`."""
    filled = _filled(batch)
    ids = filled.task_ids.view(-1)
    counts = torch.bincount(ids)
    present = torch.nonzero(counts)[:, 0]
    places = torch.zeros(len(counts), dtype=torch.int32)
    places[present] = torch.arange(len(present), dtype=torch.int32)
    contents = [getattr(filled, name) for name in _FIELDS]
    contents.append(present)
    pieces = []
    for own in (ids, ids[filled.positions]):
        index = places[own]
        found = runs_of(index, len(present))
        pieces.append(_multiple(len(found.pieces), _ROWS))
        contents += [index, *runs_of(index, len(present), pieces[-1])]
    tables = [filled.segments.tile_table(block) for block in blocks]
    rows = [_multiple(len(table), _ROWS) for table in tables]
    contents += [
        filled.segments.tile_table(block, capacity=most)
        for block, most in zip(blocks, rows, strict=True)
    ]
    contents += filled.segments.trees or ()
    sizes = _Sizes(
        len(ids),
        len(filled.positions),
        len(filled.targets),
        len(present),
        (pieces[0], pieces[1]),
        tuple(rows),
        filled.segments.reach is not None,
    )
    return filled, sizes, contents


def _asked(
    filled: PackedBatch, there: list[Tensor], blocks: list[int]
) -> tuple[PackedBatch, tuple[Slots, Slots]]:
    """A pass and its routing, of tensors on a card."""
    *fields, present = there[: len(_FIELDS) + 1]
    every, chosen, rest = there[6:9], there[9:12], there[12:]
    slots = [
        Slots(present, own[0], None, make_runs=partial(Runs, own[1], own[2]))
        for own in (every, chosen)
    ]
    tables = {(block, False): table for block, table in zip(blocks, rest, strict=False)}
    trees = Trees(*rest[len(blocks) :]) if filled.segments.reach is not None else None
    segments = replace(filled.segments.ready(tables, trees), device=present.device)
    named: dict[str, Any] = dict(zip(_FIELDS, fields, strict=True))
    return replace(filled, segments=segments, **named), (slots[0], slots[1])


def _multiple(count: int, unit: int) -> int:
    return -(-max(1, count) // unit) * unit


def _filled(batch: PackedBatch) -> PackedBatch:
    """A pass with further positions, of the last one's task, and questions; what fills up answers nothing."""
    missing = -batch.input_ids.numel() % _POSITIONS
    lengths = [_SEGMENT] * (missing // _SEGMENT) + [missing % _SEGMENT] * (missing % _SEGMENT > 0)

    def more(values: Tensor, unit: int) -> Tensor:
        return torch.cat([values, values.new_zeros(-len(values) % unit)])

    tokens = torch.zeros(1, missing, dtype=torch.long)
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, tokens], dim=1),
        position_ids=torch.cat([batch.position_ids, torch.arange(missing)[None] % _SEGMENT], dim=1),
        task_ids=torch.cat([batch.task_ids, tokens + batch.task_ids[0, -1]], dim=1),
        segments=batch.segments.and_more(lengths) if lengths else batch.segments,
        positions=more(batch.positions, _ASKED),
        owner=more(batch.owner, _ASKED),
        targets=more(batch.targets, _ASKED),
    )
