"""What `dense_study.py` measures: sums of each picture, made on the card, and metrics of weighted pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from dense_data import CLASSES
from torch import Tensor

UP = {"segmentation": True, "depth": False, "normals": False, "edges": True}  # better when larger
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
SIZES = {"segmentation": 3 * CLASSES, "depth": 2, "normals": 2, "edges": 3 * len(THRESHOLDS) + 1}


def sums(task: str, answer: Tensor, target: Tensor) -> Tensor:
    """float32 [N, SIZES[task]] of each picture, by operations that wait for nothing.

    Of classes those met, answered and there; of depth squares and pixels; of normals angles and pixels; of edges
    for each threshold marks with an edge near, marks, edges with a mark near, and all edges.
    """
    if task == "segmentation":
        return _classes(answer, target)
    if task == "depth":
        square = (answer[:, 0] - target).square().flatten(1)
        return torch.stack([square.sum(1), torch.full_like(square[:, 0], square.shape[1])], 1)
    if task == "edges":
        return _edges(answer, target)
    known = ~target.isnan().any(1)
    cosine = (answer * torch.where(known[:, None], target, 0.0)).sum(1).clamp(-1, 1)
    angle = torch.where(known, torch.rad2deg(torch.acos(cosine)), 0.0)
    return torch.stack([angle.flatten(1).sum(1), known.flatten(1).float().sum(1)], 1)


def _classes(answer: Tensor, target: Tensor) -> Tensor:
    known = (target >= 0).flatten(1)
    best, right = answer.argmax(1).flatten(1), target.flatten(1).clamp(min=0)
    found = []
    for values, mask in ((best, known & (best == right)), (best, known), (right, known)):
        counts = torch.zeros(len(target), CLASSES, device=target.device)
        found.append(counts.scatter_add_(1, values, mask.float()))
    return torch.cat(found, 1)


def _edges(answer: Tensor, target: Tensor) -> Tensor:
    known = ~target.isnan()[:, None]
    right = (known & (target[:, None] >= 0.5)).float()
    levels = torch.arange(1, 20, device=answer.device).view(1, -1, 1, 1) / 20
    marked = (known & (torch.sigmoid(answer) >= levels)).float()
    near, wide = (F.max_pool2d(some, 3, 1, 1) for some in (right, marked))
    parts = [(marked * near), marked, (right * wide)]
    by = torch.stack([part.flatten(2).sum(2) for part in parts], 2).flatten(1)
    return torch.cat([by, right.flatten(1).sum(1, keepdim=True)], 1)


def metric(task: str, stats: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """mIoU in percent, RMSE over all pixels in metres, the mean angle over all pixels in degrees, or the best F of
    edges at one pixel in percent.

    Args:
        task: which.
        stats: of `sums`, [N, …].
        weights: [draws, N], how often each picture counts.
    """
    total = weights @ stats.astype(np.float64)
    if task == "segmentation":
        met, answered, there = np.split(total, 3, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            iou = np.where(there > 0, met / (answered + there - met), np.nan)
        return 100 * np.nanmean(iou, axis=1)
    if task == "edges":
        near, marked, hit = total[:, :-1].reshape(len(total), -1, 3).transpose(2, 0, 1)
        precision = near / np.maximum(marked, 1)
        recall = hit / np.maximum(total[:, -1:], 1)
        return 100 * (2 * precision * recall / np.maximum(precision + recall, 1e-9)).max(1)
    mean = total[:, 0] / total[:, 1]
    return np.sqrt(mean) if task == "depth" else mean


def of_all(task: str, stats: np.ndarray) -> float:
    """The metric where each picture counts once."""
    return float(metric(task, stats, np.ones((1, len(stats))))[0])


def better(task: str, value: Any, reference: Any) -> Any:
    """Relative improvement in percent, as Δm sums it."""
    return (1 if UP[task] else -1) * 100 * (value - reference) / reference


def score(stats: dict[str, np.ndarray]) -> float:
    """Mean of ±log of the metrics: what rates are chosen by, whatever the metrics' units."""
    signs = [(1 if UP[task] else -1) * np.log(of_all(task, own)) for task, own in stats.items()]
    return float(np.mean(signs))


def interval(values: np.ndarray) -> list[float]:
    """The value itself, which stands first, and the bounds of 95 % of the draws."""
    low, high = np.percentile(values[1:], (2.5, 97.5))
    return [float(values[0]), float(low), float(high)]
