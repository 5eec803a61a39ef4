"""What is counted on one map, so that metrics over many are sums: the one place that compares pixels.

A *tally* is float64 [K]. Tallies of several images add up, and so a metric of all pixels of a resample of
images is a function of their sum: mIoU is no mean over images.

| objective | K | what is counted, over pixels whose truth is known |
| --- | --- | --- |
| segmentation, parts | C² | confusion: pixels of each right class (row) that got each class |
| depth | 7 | pixels, Σ d², Σ |d| / z, pixels with max(ẑ/z, z/ẑ) < 1.25, 1.25², 1.25³, and the image's own RMSE |
| normals | 2 + 720 | pixels, Σ angle in degrees, pixels by angle in steps of a quarter of a degree |
| edges | 3 · 19 + 1 | by threshold: marked pixels with an edge within a pixel, marked pixels, edges with a marked pixel within a pixel; and edges |
| saliency | 3 · 15 | by threshold: IoU, precision and recall of the image |
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray
EDGE_THRESHOLDS = np.arange(1, 20) / 20
SALIENCY_THRESHOLDS = np.linspace(0.2, 0.9, 15)
ANGLE_STEPS = 4  # bins a degree
ANGLE_BINS = 180 * ANGLE_STEPS
LEAST_DEPTH = 1e-6  # a smaller answer counts as this where ratios are taken


def confusion(truth: Array, answer: Array, classes: int) -> Array:
    """[C²]; truth is an integer below 0 where it is not known."""
    known = truth >= 0
    cells = truth[known].astype(np.int64) * classes + answer[known]
    return np.bincount(cells, minlength=classes * classes).astype(np.float64)


def depth(truth: Array, answer: Array) -> Array:
    """[7]; see the table."""
    known = np.isfinite(truth)
    right, given = truth[known].astype(np.float64), answer[known].astype(np.float64)
    if not right.size:
        return np.zeros(7)
    apart = given - right
    positive = np.maximum(given, LEAST_DEPTH)
    ratio = np.maximum(positive / right, right / positive)
    squares = float(np.square(apart).sum())
    within = [float((ratio < 1.25**power).sum()) for power in (1, 2, 3)]
    relative = float((np.abs(apart) / right).sum())
    return np.array([right.size, squares, relative, *within, np.sqrt(squares / right.size)])


def normals(truth: Array, answer: Array) -> Array:
    """[2 + 720]; both [H, W, 3], of any length above 0."""
    known = np.isfinite(truth).all(axis=2)
    right, given = truth[known].astype(np.float64), answer[known].astype(np.float64)
    length = np.linalg.norm(right, axis=1) * np.linalg.norm(given, axis=1)
    cosine = (right * given).sum(1) / np.maximum(length, 1e-12)
    angles = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    places = np.minimum((angles * ANGLE_STEPS).astype(np.int64), ANGLE_BINS - 1)
    counts = np.bincount(places, minlength=ANGLE_BINS)
    return np.concatenate([[angles.size, angles.sum()], counts])


def edges(truth: Array, answer: Array) -> Array:
    """[3 · 19 + 1]; truth is an edge from 1/2 on, answers are probabilities."""
    known = np.isfinite(truth)
    right = known & (truth >= 0.5)
    near = _widened(right)
    found = []
    for threshold in EDGE_THRESHOLDS:
        marked = known & (answer >= threshold)
        found += [(marked & near).sum(), marked.sum(), (right & _widened(marked)).sum()]
    return np.array([*found, right.sum()], dtype=np.float64)


def _widened(marks: Array) -> Array:
    """Each mark and its eight neighbours."""
    wide = marks.copy()
    wide[:, 1:] |= marks[:, :-1]
    wide[:, :-1] |= marks[:, 1:]
    rows = wide.copy()
    wide[1:] |= rows[:-1]
    wide[:-1] |= rows[1:]
    return wide


def saliency(truth: Array, answer: Array) -> Array:
    """[3 · 15]; truth is salient from 1/2 on, answers are probabilities.

    Where nothing is salient and nothing marked, all three are 1; where only one of them is so, 0.
    """
    known = np.isfinite(truth)
    right, given = truth[known] >= 0.5, answer[known]
    there = int(right.sum())
    found = []
    for threshold in SALIENCY_THRESHOLDS:
        marked = given >= threshold
        hits, count = int((marked & right).sum()), int(marked.sum())
        union = there + count - hits
        nothing = float(union == 0)
        found += [
            hits / union if union else nothing,
            hits / count if count else nothing,
            hits / there if there else nothing,
        ]
    return np.array(found, dtype=np.float64)


def tally_of(objective: str, channels: int) -> Callable[[Array, Array], Array]:
    """What counts a pair of maps, truth and answer, of an objective.

    Args:
        objective: of a map.
        channels: of it; of classes how many there are.
    """
    if objective in ("segmentation", "parts"):
        return lambda truth, answer: confusion(truth, answer, channels)
    return {"depth": depth, "normals": normals, "edges": edges, "saliency": saliency}[objective]
