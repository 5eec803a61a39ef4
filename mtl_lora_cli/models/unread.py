"""Layers of a tower that the language part is given nothing of: behind the last one that it reads, or of a pooling head."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

# How transformers names the classes that make one vector of a picture (SigLIP's, SigLIP 2's and AIMv2's `head`, the `pooler` of
# ViT, DeiT, BEiT, Data2Vec, DPT): a tower gives it as `pooler_output`, beside the tokens that such models read.
_POOLING = ("PoolingHead", "Pooler")
_READ = ("Gemma4VisionPooler",)  # it averages neighbours: these are the tokens
_NUMBER = re.compile(r"\.layers?\.(\d+)\.")


def unread_layers(model: Any, paths: Iterable[str]) -> list[str]:
    """Those of some modules whose output nobody reads: what learns there gets no gradient.

    `vision_feature_layer` of a configuration counts what the tower's layers give from 0 on, the embeddings; −1 is what
    the last one gives. A tower's pooling head makes one vector of a picture, which no such model reads.
    """
    inside = [path for path in paths if _in_tower(path)]
    behind, heads = set(_behind(model, inside)), _heads(model)
    return [path for path in inside if path in behind or path.startswith(heads)]


def _heads(model: Any) -> tuple[str, ...]:
    """Where the pooling heads of towers are: how the paths of what is inside begin."""
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    return tuple(
        f"{path}." for path, kind in kinds.items() if kind.endswith(_POOLING) and kind not in _READ
    )


def _behind(model: Any, paths: Iterable[str]) -> list[str]:
    config = model.config
    read, tower = (
        getattr(config, name, None) for name in ("vision_feature_layer", "vision_config")
    )
    depth = getattr(tower, "num_hidden_layers", None)
    if read is None or depth is None:
        return []
    numbers = read if isinstance(read, list | tuple) else [read]
    last = max(number if number >= 0 else depth + 1 + number for number in numbers)
    return [path for path in paths if _number(path) >= last]


def unread_line(model: Any, paths: Iterable[str]) -> str | None:
    """The same in words; None: there are none."""
    unread = unread_layers(model, paths)
    if not unread:
        return None
    read = getattr(model.config, "vision_feature_layer", None)
    where = (
        "of a pooling head, or " if any(path.startswith(_heads(model)) for path in unread) else ""
    )
    layer = "" if read is None else f" (vision_feature_layer: {read})"
    return (
        f"adapter.target_modules: {named(unread)} of the tower: {where}behind the last layer that the language part "
        f"reads{layer}, so nothing is learned there"
    )


def named(paths: list[str], most: int = 3) -> str:
    """The first few of them, and how many others there are."""
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(paths[:most]) + more


def _in_tower(path: str) -> bool:
    return any(part.startswith("vision") for part in path.split("."))


def _number(path: str) -> int:
    """Of the layer that a module belongs to; −1: it belongs to none."""
    found = _NUMBER.search(path)
    return -1 if found is None else int(found[1])
