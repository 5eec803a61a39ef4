"""Embeddings of a pass with pictures: those of its text, and in the places of picture tokens what a tower sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.models.batch import PackedBatch, Pictures
from mtl_lora_cli.models.vision import Seen, features, vision_class


def embeddings(model: Any, batch: PackedBatch, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """[N, d] of a batch with pictures.

    The tower sees all pictures of the pass at once. What it makes of one depends on no other picture.

    Args:
        model: transformers' own, with or without adapters.
        batch: on the model's device.
        embed: tokens, int64 [1, N], to embeddings [N, d].
    """
    kind = vision_class(model.config)
    assert batch.pictures is not None and kind is not None
    places = batch.pictures.places
    # A picture's token may lie beyond the embedding's rows.
    x = embed(batch.input_ids.index_fill(1, places, 0))
    seen = features(model, kind.join(batch.pictures.seen), tower_dtype(model))
    return x.index_copy(0, places, seen.to(x.dtype))


def pictures_in(
    input_ids: Tensor, seen: Sequence[Seen], counts: Sequence[int], token: int
) -> Pictures | None:
    """The pictures of a pass, whose tokens stand in it; None: there are none.

    Args:
        input_ids: int64 [1, N].
        seen: of each picture what the tower takes, in the order of their places.
        counts: of each how many tokens it has.
        token: that stands for a part of a picture.
    """
    if not seen:
        return None
    places = torch.nonzero(input_ids[0] == token)[:, 0]
    assert len(places) == sum(counts), "rows are looked at before they are packed"
    return Pictures(seen, counts, places)


def tower_dtype(model: Any) -> torch.dtype:
    """In which pixels are given to the tower: that of the model's embeddings, whatever learns wider."""
    found: torch.dtype = model.get_input_embeddings().weight.dtype
    return found
