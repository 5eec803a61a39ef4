"""One view of a picture and all its maps: held against plain loops, and against each other."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mtl_lora_cli.pictures.augment import (
    WHOLE,
    View,
    draw_view,
    mirrored_classes,
    mirrored_normals,
    seen_map,
    seen_picture,
)
from mtl_lora_cli.pictures.derive import edges_from_classes, normals_from_depth
from mtl_lora_cli.pictures.values import UNKNOWN

H, W = 24, 32
VIEWS = [
    WHOLE,
    View(flip=True),
    View(scale=2.0, top=0.3, left=1.0),
    View(flip=True, scale=0.6, top=0.2, left=0.9),
    View(scale=1.37, top=0.0, left=0.5),
]


def by_loops(values: np.ndarray, view: View, size: tuple[int, int]) -> np.ndarray:
    found = np.full((*size, *values.shape[2:]), UNKNOWN if values.dtype.kind == "i" else np.nan)
    tall, wide = values.shape[0] / view.scale, values.shape[1] / view.scale
    for i in range(size[0]):
        for j in range(size[1]):
            column = size[1] - 1 - j if view.flip else j
            y = view.top * (values.shape[0] - tall) + (i + 0.5) * tall / size[0]
            x = view.left * (values.shape[1] - wide) + (column + 0.5) * wide / size[1]
            if 0 <= y < values.shape[0] and 0 <= x < values.shape[1]:
                found[i, j] = values[int(y), int(x)]
    return found


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_maps_take_the_nearest_value(view: View) -> None:
    generator = np.random.default_rng(0)
    classes = generator.integers(0, 9, (H, W)).astype(np.int16)
    normals = generator.normal(size=(H, W, 3)).astype(np.float32)
    for values in (classes, normals):
        np.testing.assert_array_equal(
            seen_map(values, view, (15, 21)), by_loops(values, view, (15, 21))
        )


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_picture_and_map_lie_on_each_other(view: View) -> None:
    """A map of a picture's own colours, seen alike, has the colours of the picture that is seen."""
    blocks = np.random.default_rng(1).integers(0, 2, (3, 4)).astype(np.uint8) * 200 + 20
    grey = blocks.repeat(40, axis=0).repeat(40, axis=1)
    seen = seen_picture(Image.fromarray(grey).convert("RGB"), view, (60, 80), (7, 7, 7))[..., 0]
    known = seen_map(grey.astype(np.int16), view, (60, 80))
    where = known >= 0
    assert (np.abs(seen[where].astype(int) - known[where]) <= 40).mean() > 0.93
    assert (seen[~where] == 7).mean() > 0.9 or where.all()


def test_a_view_follows_from_its_generator() -> None:
    many = [draw_view(True, (0.5, 2.0), np.random.default_rng(n)) for n in range(400)]
    assert many[3] == draw_view(True, (0.5, 2.0), np.random.default_rng(3))
    assert 0.4 < np.mean([one.flip for one in many]) < 0.6
    scales = np.log2([one.scale for one in many])
    assert -1 <= scales.min() < -0.9 and 0.9 < scales.max() <= 1 and abs(scales.mean()) < 0.1
    plain = draw_view(False, (1.0, 1.0), np.random.default_rng(3))
    assert (plain.flip, plain.scale) == (False, 1.0)


def test_a_mirror_turns_what_values_say() -> None:
    normals = np.array([[[0.6, 0.0, -0.8]]], dtype=np.float32)
    assert mirrored_normals(normals).tolist()[0][0] == pytest.approx([-0.6, 0, -0.8])
    classes = np.array([[0, 1, 2, 3]], dtype=np.int16)
    assert mirrored_classes(classes, ((1, 2),)).tolist() == [[0, 2, 1, 3]]


def test_mirrored_normals_are_those_of_the_mirrored_depth() -> None:
    """Normals of a slanted plane, by hand, and of the same depth mirrored."""
    camera = (1.0, 4 / 3, 0.5, 0.5)
    v, u = np.mgrid[0:H, 0:W]
    x, y = ((u + 0.5) / W - 0.5) / camera[0], ((v + 0.5) / H - 0.5) / camera[1]
    plane = np.array([0.2, -0.5, 0.4])  # a X + b Y + c Z = 1, and 1 / Z = a x + b y + c
    depth = (1 / (plane[0] * x + plane[1] * y + plane[2])).astype(np.float32)
    found = normals_from_depth(depth, camera)
    inside = found[8:-8, 8:-8]
    assert inside == pytest.approx(
        np.broadcast_to(-plane / np.linalg.norm(plane), inside.shape), abs=1e-3
    )
    mirrored = normals_from_depth(depth[:, ::-1].copy(), camera)[8:-8, 8:-8]
    assert mirrored == pytest.approx(mirrored_normals(found[:, ::-1])[8:-8, 8:-8], abs=1e-3)
    depth[:12] = np.nan
    assert np.isnan(normals_from_depth(depth, camera)[:12]).all()


def test_edges_are_where_a_neighbour_differs() -> None:
    classes = np.array([[1, 1, 2], [1, 1, 2], [UNKNOWN, 3, 2]], dtype=np.int16)
    found = edges_from_classes(classes)
    assert found[:2].tolist() == [[0, 0, 1], [0, 0, 1]]
    assert np.isnan(found[2, 0]) and found[2, 1:].tolist() == [1, 1]
