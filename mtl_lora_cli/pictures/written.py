"""Maps to files: PNG that any viewer shows, or arrays."""

from __future__ import annotations

import colorsys
import io

import numpy as np
from PIL import Image


def palette(count: int) -> list[int]:
    """Colours of so many values, RGB one after another: neighbours far apart in hue."""
    found: list[int] = []
    for number in range(count):
        hue, light = (number * 0.61803398875) % 1, (0.5, 0.35, 0.65)[number // 12 % 3]
        found += [round(255 * part) for part in colorsys.hls_to_rgb(hue, light, 0.75)]
    return found


def png(values: np.ndarray) -> bytes:
    """uint8 [H, W] or [H, W, 3], or uint16 [H, W], as a PNG."""
    return _saved(Image.fromarray(values))


def class_png(values: np.ndarray, colours: int) -> bytes:
    """Stored classes [H, W]: a palette's indices where 256 colours suffice, else 16 bits.

    Args:
        values: uint16.
        colours: how many values there may be.
    """
    if colours > 256:
        return png(values)
    height, width = values.shape
    image = Image.frombytes("P", (width, height), values.astype(np.uint8).tobytes())
    image.putpalette(palette(colours))
    return _saved(image)


def npy(values: np.ndarray) -> bytes:
    """As NumPy stores it."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(values), allow_pickle=False)
    return file.getvalue()


def depth_codes(depth: np.ndarray, low: float, high: float, scale: str) -> np.ndarray:
    """16-bit codes of depth, uint16 [H, W]: the inverse of `values.as_depth` with 16 bits; what lies outside of low
    to high becomes the nearer of them."""
    clipped = np.clip(depth.astype(np.float64), low, high)
    if scale == "log":
        share = np.log(clipped / low) / np.log(high / low)
    else:
        share = (clipped - low) / (high - low)
    return np.rint(share * 65535).astype(np.uint16)


def normal_bytes(normals: np.ndarray) -> np.ndarray:
    """Normals [H, W, 3] as bytes: (n + 1) · 127.5, rounded."""
    return np.rint((np.nan_to_num(normals) + 1) * 127.5).clip(0, 255).astype(np.uint8)


def _saved(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=False)
    return file.getvalue()
