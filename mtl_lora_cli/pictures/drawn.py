"""Maps as a person sees them, and pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from mtl_lora_cli.pictures.written import palette, png

_UNKNOWN = (40, 40, 40)
_GAP = 4


def coloured(
    values: np.ndarray, objective: str, channels: int, low: float = 0.0, high: float = 1.0
) -> np.ndarray:
    """A map in colours, uint8 [H, W, 3]; dark grey where nothing is known.

    Args:
        values: as `pictures.values` gives it.
        objective: of the map.
        channels: how many classes there are.
        low, high: of depth: the nearest and the farthest colour.
    """
    if objective in ("segmentation", "parts"):
        colours = np.array([*palette(channels), *_UNKNOWN], dtype=np.uint8).reshape(-1, 3)
        return np.asarray(colours[np.where(values < 0, channels, values)])
    if objective == "normals":
        shown, known = (values + 1) / 2, np.isfinite(values).all(axis=2)
    else:
        if objective == "depth":
            with np.errstate(invalid="ignore", divide="ignore"):
                share = np.log(np.maximum(values, low or high / 100) / (low or high / 100))
                values = 1 - share / np.log(high / (low or high / 100))
        shown, known = np.repeat(values[:, :, None], 3, axis=2), np.isfinite(values)
    found = np.nan_to_num(shown.clip(0, 1)) * 255
    found[~known] = _UNKNOWN
    return np.rint(found).astype(np.uint8)


def side_by_side(pictures: Sequence[np.ndarray], height: int) -> bytes:
    """Pictures uint8 [H, W, 3] beside each other, each of the same height, as a PNG."""
    parts = []
    for one in pictures:
        width = max(1, round(one.shape[1] * height / one.shape[0]))
        image = Image.fromarray(np.ascontiguousarray(one))
        parts.append(np.asarray(image.resize((width, height), Image.Resampling.NEAREST)))
        parts.append(np.full((height, _GAP, 3), 255, dtype=np.uint8))
    return png(np.concatenate(parts[:-1], axis=1))
