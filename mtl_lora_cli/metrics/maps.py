"""Metrics of maps, each once: w [R, E] → [R], over the images' tallies (`tallies.py`)."""

from __future__ import annotations

import math

import numpy as np

from mtl_lora_cli.metrics.declare import DEPTH, EDGES, NORMALS, SALIENCY, SEGMENTATION, metric
from mtl_lora_cli.metrics.outcome import Array, Outcome
from mtl_lora_cli.metrics.tallies import ANGLE_STEPS, EDGE_THRESHOLDS, SALIENCY_THRESHOLDS

_READS = ("tallies",)
BETA_SQUARED = 0.3  # of saliency's F: precision weighs more, as in its literature


def _summed(o: Outcome, w: Array) -> Array:
    """[R, K]."""
    assert o.tallies is not None
    return w @ o.tallies


def _ratio(above: Array, below: Array) -> Array:
    """NaN where nothing was counted."""
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def _confusion(o: Outcome, w: Array) -> Array:
    """[R, C, C], right classes in rows."""
    summed = _summed(o, w)
    size = math.isqrt(summed.shape[1])
    return summed.reshape(len(w), size, size)


@metric("miou", of=SEGMENTATION, reads=_READS)
def miou(o: Outcome, w: Array) -> Array:
    """The mean of TP / (TP + FP + FN) over the classes that occur in truth or answers, of all pixels of all
    images together."""
    counts = _confusion(o, w)
    hits = np.diagonal(counts, axis1=1, axis2=2)
    union = counts.sum(1) + counts.sum(2) - hits
    each = np.divide(hits, union, out=np.zeros_like(hits), where=union > 0)
    return _ratio(each.sum(1), (union > 0).sum(1).astype(np.float64))


@metric("pixel_accuracy", of=SEGMENTATION, reads=_READS)
def pixel_accuracy(o: Outcome, w: Array) -> Array:
    """The share of pixels with the right class."""
    counts = _confusion(o, w)
    return _ratio(np.trace(counts, axis1=1, axis2=2), counts.sum((1, 2)))


@metric("depth_rmse", of=DEPTH, reads=_READS, better="lower", range=(0, math.inf), undefined_as=1e3)
def depth_rmse(o: Outcome, w: Array) -> Array:
    """√(Σ d² / n) over all pixels of all images, in the depth's unit."""
    summed = _summed(o, w)
    return np.sqrt(_ratio(summed[:, 1], summed[:, 0]))


@metric(
    "depth_rmse_images",
    of=DEPTH,
    reads=_READS,
    better="lower",
    range=(0, math.inf),
    undefined_as=1e3,
)
def depth_rmse_images(o: Outcome, w: Array) -> Array:
    """The mean over images of each image's own √(Σ d² / n)."""
    assert o.tallies is not None
    known = (o.tallies[:, 0] > 0).astype(np.float64)
    return _ratio(_summed(o, w)[:, 6], w @ known)


@metric("abs_rel", of=DEPTH, reads=_READS, better="lower", range=(0, math.inf), undefined_as=1e3)
def abs_rel(o: Outcome, w: Array) -> Array:
    """The mean of |ẑ − z| / z over all pixels."""
    summed = _summed(o, w)
    return _ratio(summed[:, 2], summed[:, 0])


def _delta(power: int) -> None:
    def share(o: Outcome, w: Array) -> Array:
        summed = _summed(o, w)
        return _ratio(summed[:, 2 + power], summed[:, 0])

    share.__doc__ = f"The share of pixels with max(ẑ / z, z / ẑ) < 1.25^{power}."
    share.__module__ = __name__
    metric(f"delta_{power}", of=DEPTH, reads=_READS)(share)


for _power in (1, 2, 3):
    _delta(_power)


@metric("mean_angle", of=NORMALS, reads=_READS, better="lower", range=(0, 180), digits=2)
def mean_angle(o: Outcome, w: Array) -> Array:
    """The mean angle between right and given normals over all pixels, in degrees."""
    summed = _summed(o, w)
    return _ratio(summed[:, 1], summed[:, 0])


@metric("median_angle", of=NORMALS, reads=_READS, better="lower", range=(0, 180), digits=2)
def median_angle(o: Outcome, w: Array) -> Array:
    """The median of these angles, from counts in steps of a quarter of a degree, even within a step."""
    counts = _summed(o, w)[:, 2:]
    upto = np.cumsum(counts, axis=1)
    total = upto[:, -1]
    place = np.argmax(upto >= total[:, None] / 2, axis=1)
    rows = np.arange(len(counts))
    inside = counts[rows, place]
    share = np.divide(
        total / 2 - (upto[rows, place] - inside), inside, out=np.zeros(len(w)), where=inside > 0
    )
    return np.where(total > 0, (place + share) / ANGLE_STEPS, np.nan)


def _within(degrees: float) -> None:
    bins = round(degrees * ANGLE_STEPS)

    def share(o: Outcome, w: Array) -> Array:
        summed = _summed(o, w)
        return _ratio(summed[:, 2 : 2 + bins].sum(1), summed[:, 0])

    share.__doc__ = f"The share of pixels whose angle is below {degrees:g}°."
    share.__module__ = __name__
    metric(f"within_{f'{degrees:g}'.replace('.', '_')}", of=NORMALS, reads=_READS)(share)


for _degrees in (11.25, 22.5, 30.0):
    _within(_degrees)


@metric("edge_f", of=EDGES, reads=_READS)
def edge_f(o: Outcome, w: Array) -> Array:
    """2 P R / (P + R) at the threshold, of 0.05, 0.10 … 0.95, that is best over all images of a resample.

    P is the share of marked pixels with an edge within one pixel (of 3 x 3), R that of edges with a marked
    pixel within one. This is not odsF of the literature, which thins the marks first, matches them one to
    one, and allows for more distance.
    """
    summed = _summed(o, w)
    by = summed[:, :-1].reshape(len(w), len(EDGE_THRESHOLDS), 3)
    there = np.broadcast_to(summed[:, -1:], by.shape[:2])
    zeros = np.zeros(by.shape[:2])
    precision = np.divide(by[..., 0], by[..., 1], out=zeros.copy(), where=by[..., 1] > 0)
    recall = np.divide(by[..., 2], there, out=zeros.copy(), where=there > 0)
    both = precision + recall
    best = np.divide(2 * precision * recall, both, out=zeros, where=both > 0).max(1)
    return np.where((summed[:, -1] > 0) | (by[..., 1].max(1) > 0), best, np.nan)


def _means(o: Outcome, w: Array) -> Array:
    """Means over images, [R, thresholds, 3]: IoU, precision, recall."""
    return (_summed(o, w) / w.sum(1, keepdims=True)).reshape(len(w), len(SALIENCY_THRESHOLDS), 3)


@metric("saliency_miou", of=SALIENCY, reads=_READS)
def saliency_miou(o: Outcome, w: Array) -> Array:
    """The mean over images of the salient part's IoU, at the best of 15 thresholds from 0.2 to 0.9."""
    return np.asarray(_means(o, w)[..., 0].max(1))


@metric("max_f", of=SALIENCY, reads=_READS)
def max_f(o: Outcome, w: Array) -> Array:
    """1.3 P R / (0.3 P + R) of the images' mean precision and recall, at the best of the same thresholds.

    Source: Achanta et al. 2009, doi 10.1109/CVPR.2009.5206596 (β² = 0.3).
    """
    means = _means(o, w)
    precision, recall = means[..., 1], means[..., 2]
    below = BETA_SQUARED * precision + recall
    above = (1 + BETA_SQUARED) * precision * recall
    return np.divide(above, below, out=np.zeros(below.shape), where=below > 0).max(1)


def delta_m(values: dict[str, float], references: dict[str, float], lower: set[str]) -> float:
    """Δm in percent: (100 / T) Σ_t ± (value_t − reference_t) / reference_t, + where higher is better.

    Args:
        values: of each task the metric of the model that is judged.
        references: of each task that of the single-task model.
        lower: tasks whose metric is better when it is lower.

    Source: Maninis et al. 2019, arXiv 1904.08918; T tasks, one metric each.
    """
    parts = [
        (-1 if task in lower else 1) * (value - references[task]) / references[task]
        for task, value in values.items()
    ]
    return 100 * math.fsum(parts) / len(parts)
