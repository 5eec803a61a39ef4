"""One view of a picture and of all its maps: mirrored or not, scaled, cut to size.

A view is a box of the picture, which may be larger than the picture; output pixel (i, j) shows the source at
top + (i + ½) box height / height and left + (j + ½) box width / width. Pictures are interpolated, maps take the
nearest value, and what lies outside is not known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mtl_lora_cli.pictures.values import UNKNOWN


@dataclass(frozen=True)
class View:
    """What is seen of a picture.

    Attributes:
        flip: mirrored left to right.
        scale: 1: all of the picture; 2: a half of its height and width; below 1: more than the picture.
        top, left: of the place that is left for the box, the share above and to the left of it, 0 to 1.
    """

    flip: bool = False
    scale: float = 1.0
    top: float = 0.5
    left: float = 0.5

    def box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Top, left, height and width of what is seen, in pixels of the picture."""
        tall, wide = height / self.scale, width / self.scale
        return self.top * (height - tall), self.left * (width - wide), tall, wide


WHOLE = View()


def draw_view(flip: bool, scale: tuple[float, float], generator: np.random.Generator) -> View:
    """A random view: mirrored half of the times; the scale's logarithm and the place even.

    As many numbers are drawn whatever is asked for.
    """
    mirrored, share, top, left = generator.random(4)
    low, high = scale
    return View(
        flip=flip and bool(mirrored < 0.5),
        scale=float(low * (high / low) ** share),
        top=float(top),
        left=float(left),
    )


def seen_picture(
    picture: Image.Image, view: View, size: tuple[int, int], fill: tuple[int, int, int]
) -> np.ndarray:
    """The view, uint8 [h, w, 3].

    Args:
        picture: in RGB.
        view: what is seen.
        size: h and w.
        fill: the colour of what lies outside.
    """
    height, width = size
    top, left, tall, wide = view.box(picture.height, picture.width)
    # The part of the output that shows the picture: all of it where the box lies inside.
    y0, y1 = _shown(top, tall, picture.height, height)
    x0, x1 = _shown(left, wide, picture.width, width)
    box = (
        max(0.0, left),
        max(0.0, top),
        min(float(picture.width), left + wide),
        min(float(picture.height), top + tall),
    )
    part = picture.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=box)
    if part.size == (width, height):
        found = np.asarray(part)
    else:
        whole = Image.new("RGB", (width, height), fill)
        whole.paste(part, (x0, y0))
        found = np.asarray(whole)
    return found[:, ::-1] if view.flip else found


def _shown(start: float, extent: float, source: int, pixels: int) -> tuple[int, int]:
    """First and last output pixel (behind it) whose middles show a source of that extent."""
    first = round(max(0.0, -start) * pixels / extent)
    last = round(min(extent, source - start) * pixels / extent)
    return min(first, pixels - 1), max(last, first + 1)


def seen_map(values: np.ndarray, view: View, size: tuple[int, int]) -> np.ndarray:
    """The view of a map [H, W] or [H, W, C] → [h, w] or [h, w, C], by the nearest value.

    Not turned is what the values say of left and right: see `mirrored`.
    """
    height, width = values.shape[:2]
    top, left, tall, wide = view.box(height, width)
    rows, columns = _nearest(top, tall, height, size[0]), _nearest(left, wide, width, size[1])
    # `take` is faster than an index of both, and lets other threads run.
    found = values.take(rows.clip(0, height - 1), axis=0).take(columns.clip(0, width - 1), axis=1)
    outside = ((rows < 0) | (rows >= height))[:, None] | ((columns < 0) | (columns >= width))[None]
    if outside.any():
        found[outside] = UNKNOWN if values.dtype.kind in "iu" else np.nan
    return found[:, ::-1] if view.flip else found


def _nearest(start: float, extent: float, source: int, pixels: int) -> np.ndarray:
    """The source's pixel that the middle of each output pixel shows, int64; outside of 0 to source: none."""
    return np.floor(start + (np.arange(pixels) + 0.5) * extent / pixels).astype(np.int64)


def mirrored_normals(normals: np.ndarray) -> np.ndarray:
    """Normals [h, w, 3] of a picture that was mirrored: x points the other way."""
    found = np.array(normals)
    np.negative(found[:, :, 0], out=found[:, :, 0])
    return found


def mirrored_classes(classes: np.ndarray, pairs: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Classes of a picture that was mirrored: a left arm is a right arm now."""
    found = classes.copy()
    for one, two in pairs:
        found[classes == one], found[classes == two] = two, one
    return found
