"""The memory that pictures of a pass take: by arithmetic on the sizes of a tower.

    held    = pixels in float32 and in the run's dtype, and d features a token and level
    working = P (6 w + 2 f) values of one layer of the tower, and the streams that it gives out, P w each

P patches of width w go through layers whose MLPs have f values inside; of a tower that learns nothing no more lives at a
time. Where features are kept, nothing works, and no pixels are held.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_lora_cli.engine.sizes import SightSizes
from mtl_lora_cli.models.load import beside_of, in_tower

if TYPE_CHECKING:
    from mtl_lora_cli.data.prepare import TrainingData
    from mtl_lora_cli.models.vision import Seen
    from mtl_lora_cli.recipe.schema import Recipe

_FLOAT32 = 4


def sight_of(data: TrainingData, recipe: Recipe, model: Any, value: int) -> SightSizes | None:
    """Bytes for each token of a picture, from the first picture of the data; None: rows show none.

    Args:
        data: of the run.
        recipe: likewise.
        model: on the meta device.
        value: bytes of a number in the run's dtype.
    """
    eyes = data.eyes
    first = next((p for s in data.splits for some in s.pictures or () for p in some[:1]), None)
    if eyes is None or first is None:
        return None
    (seen,), (count,) = eyes.looked([first]), eyes.counts([first])
    kept = recipe.images is not None and recipe.images.features == "keep"
    learns = bool(recipe.adapter.whole_modules)
    tower = bool(in_tower(model, recipe.adapter.target_modules))
    own = {} if kept else seen
    return sizes_at_sight(model, own, count, value, learns=learns or tower, tower=tower)


def sizes_at_sight(
    model: Any, seen: Seen, count: int, value: int, *, learns: bool = False, tower: bool = False
) -> SightSizes:
    """The same of one picture.

    Args:
        model: on the meta device.
        seen: what the tower takes of it; nothing where features are kept.
        count: tokens of it.
        value: bytes of a number in the run's dtype.
        learns: something behind the tower does.
        tower: something in it does: its layers keep what their backward passes need.
    """
    text, seeing = model.config.get_text_config(), model.config.vision_config
    levels = 1 + len(getattr(seeing, "deepstack_visual_indexes", None) or ())
    width = int(getattr(seeing, "hidden_size", 0) or getattr(seeing, "embed_dim", 0))
    inner = int(getattr(seeing, "intermediate_size", None) or 4 * width)
    layers = int(getattr(seeing, "num_hidden_layers", 0) or getattr(seeing, "depth", 0))
    patches = patches_of(seen, seeing) / count if seen else 0.0
    pixels = sum(v.numel() for v in seen.values() if v.is_floating_point()) / count
    learned = 4 * text.hidden_size * _FLOAT32 if learns else 0
    each = 6 * width + 2 * inner + _streams(model.config, seeing) * width
    if tower:
        learned += int(patches * layers * (10 * width + 3 * inner) * value)
    return SightSizes(
        held=int(pixels * (_FLOAT32 + value) + levels * text.hidden_size * value + learned),
        working=int(patches * each * value),
        frozen=sum(
            p.numel() for path in beside_of(model) for p in model.get_submodule(path).parameters()
        ),
    )


def _streams(config: Any, tower: Any) -> int:
    """How many layers' streams a tower gives out at a time: some models choose among all of them."""
    if not hasattr(config, "vision_feature_layer"):
        return 1
    return 1 + int(getattr(tower, "num_hidden_layers", 0))


def patches_of(seen: Seen, tower: Any) -> int:
    """Patches that a tower makes of a picture: of [n, 3, H, W], or as they are given, [.., values]."""
    pixels = seen["pixel_values"]
    if pixels.ndim != 4:
        return int(np.prod(pixels.shape[:-1]))
    side = tower.patch_size
    side = side if isinstance(side, int) else side[0]
    return len(pixels) * (pixels.shape[2] // side) * (pixels.shape[3] // side)


def most_shown(data: TrainingData, row_length: int) -> int:
    """The most picture tokens of a row, in the first epoch's packing."""
    rows = replace(data.mixture, row_length=row_length).first_rows()
    counts = [_shown(split) for split in data.splits]
    return max(sum(int(counts[task][number]) for task, number in row) for row in rows)


def _shown(split: Any) -> np.ndarray:
    """Picture tokens of each example, int64 [examples]."""
    if split.pictures is None:
        return np.zeros(len(split), np.int64)
    own = [int((split.example(n) == split.picture_token).sum()) for n in range(len(split))]
    return np.asarray(own, np.int64)
