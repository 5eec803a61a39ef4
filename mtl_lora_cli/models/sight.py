"""Pictures of a pass: where they stand, what they see, and what takes the places of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.engine.decoder import Deeper
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.models.batch import PackedBatch, Pictures
from mtl_lora_cli.models.vision import (
    KEPT,
    WHOLLY_KEPT,
    Features,
    Seen,
    Vision,
    around,
    features,
    vision_class,
)


def embeddings(
    model: Any,
    batch: PackedBatch,
    embed: Callable[[Tensor], Tensor],
    adapter: Adapter | None = None,
) -> tuple[Tensor, Deeper | None]:
    """[N, d] of a batch with pictures, and what of them enters deeper layers.

    The tower sees all pictures of the pass at once. What it makes of one depends on no other picture.

    Args:
        model: transformers' own, with or without adapters.
        batch: on the model's device.
        embed: tokens, int64 [1, N], to embeddings [N, d].
        adapter: in the model; in its tower each picture goes the way of its example's task.
    """
    assert batch.pictures is not None
    places = batch.pictures.places
    # A picture's token may lie beyond the embedding's rows.
    x = embed(batch.input_ids.index_fill(1, places, 0))
    with _routed(batch, adapter):
        seen = features_of(model, batch.pictures.seen)
    deeper = Deeper(places, seen.deeper) if seen.deeper else None
    return x.index_copy(0, places, seen.tokens.to(x.dtype)), deeper


def _routed(batch: PackedBatch, adapter: Adapter | None) -> AbstractContextManager[None]:
    """By the tasks of pictures, one id for each part of one that the tower sees."""
    assert batch.pictures is not None
    if adapter is None or "pixel_values" not in batch.pictures.seen[0]:
        return nullcontext()
    firsts = torch.tensor([0, *batch.pictures.counts]).cumsum(0)[:-1]
    tasks = batch.task_ids[0, batch.pictures.places.cpu()[firsts]]
    parts = torch.tensor([len(one["pixel_values"]) for one in batch.pictures.seen])
    return adapter.routing.assign(tasks.repeat_interleave(parts), windows=True)


def features_of(model: Any, many: Sequence[Seen]) -> Features:
    """Of several pictures: of what was kept of them, or by the tower.

    Args:
        model: transformers' own.
        many: each as the tower takes it, or as it was kept, on the model's device.
    """
    kind = vision_class(model.config)
    assert kind is not None
    names = [name for name in sorted(many[0]) if name.startswith(f"{KEPT}.")]
    if not names:
        return features(model, kind.join(many), tower_dtype(model))
    levels = [torch.cat([one[name] for one in many]) for name in names]
    if names[-1] == WHOLLY_KEPT:
        return Features(levels[-1], tuple(levels[:-1]))
    return kind.connected(around(model), levels, many)


def with_pictures(
    batch: PackedBatch,
    vision: Vision,
    many: Sequence[Seen],
    counts: Sequence[int],
    prompts: Sequence[int],
) -> PackedBatch:
    """A pass whose rows show pictures.

    Args:
        batch: on the CPU.
        vision: how the model reads pictures.
        many: of each picture what the tower takes, in the order of their places.
        counts: of each how many tokens it has.
        prompts: tokens of each example's prompt.
    """
    ids, bounds = batch.input_ids[0], batch.segments.bounds
    blocks = vision.blocks(ids, bounds, prompts)
    if blocks is not None:
        lengths = [end - start for start, end in bounds]
        local = vision.in_windows
        segments = Segments.build(lengths, batch.segments.reach, blocks, in_windows=local)
        batch = replace(batch, segments=segments)
    if not many:
        return batch
    places = torch.nonzero(ids == vision.token_id)[:, 0]
    assert len(places) == sum(counts), "rows are looked at before they are packed"
    grids = [vision.spread(one) for one in many]
    grid = None if grids[0] is None else _grid(batch, places, [g for g in grids if g is not None])
    return replace(batch, pictures=Pictures(many, counts, places, grid))


def _grid(batch: PackedBatch, places: Tensor, grids: Sequence[Tensor]) -> Tensor:
    """Positions of all tokens in several dimensions, int64 [G, 1, N].

    A picture's tokens are spread from the position on that its first one has; what follows begins behind the
    largest of theirs.
    """
    counts = [grid.shape[1] for grid in grids]
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    line = batch.position_ids[0]
    found = line.repeat(len(grids[0]), 1)
    ends = torch.tensor([end for _, end in batch.segments.bounds])
    for grid, (start, end) in zip(grids, pairwise(starts), strict=True):
        first, last = int(places[start]), int(places[end - 1])
        until = int(ends[torch.searchsorted(ends, first, right=True)])
        found[:, first : last + 1] = found[:, first : first + 1] + grid
        behind = int(grid.max()) + 1 - (last + 1 - first)
        found[:, last + 1 : until] += behind
    return found[:, None]


def tower_dtype(model: Any) -> torch.dtype:
    """In which pixels are given to the tower: that of the model's embeddings, whatever learns wider."""
    found: torch.dtype = model.get_input_embeddings().weight.dtype
    return found
