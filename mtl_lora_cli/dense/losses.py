"""The loss of one picture's map of one task: a mean over the pixels that are known.

| objective | ℓ |
| --- | --- |
| segmentation, parts | cross entropy, −log softmax(y)_c |
| edges, saliency | balanced binary cross entropy, −β t log p − (1 − β) (1 − t) log (1 − p) with p = σ(y) and β the share of the picture's known pixels that are not t (Xie and Tu, arXiv 1504.06375) |
| depth | |d − t|, in its unit |
| normals | 1 − cos of the angle |

A picture of which no pixel is known has ℓ = 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_lora_cli.tasks.maps import MapSpec

IGNORED = -100  # of classes; elsewhere NaN is not known


def map_losses(answers: Tensor, target: Tensor, spec: MapSpec) -> Tensor:
    """ℓ [N] of answers [N, C, H, W] and a target as `data.maps.MapBatch` has it."""
    if spec.of_classes:
        return _classes(answers, target)
    if spec.objective == "normals":
        return _normals(answers, target)
    answers = answers[:, 0]
    return _depth(answers, target) if spec.objective == "depth" else _shares(answers, target)


def _classes(logits: Tensor, target: Tensor) -> Tensor:
    rows = logits.movedim(1, -1).flatten(
        0, -2
    )  # no copy where channels are last, as decoders have them
    values = F.cross_entropy(rows, target.flatten(), ignore_index=IGNORED, reduction="none")
    return _mean(values.view_as(target), target != IGNORED)


def _normals(normals: Tensor, target: Tensor) -> Tensor:
    known = ~target.isnan().any(1)
    right = torch.where(known.unsqueeze(1), target, 0.0)
    return _mean(1 - (normals * right).sum(1), known)


def _depth(depth: Tensor, target: Tensor) -> Tensor:
    known = ~target.isnan()
    return _mean((depth - torch.where(known, target, 0.0)).abs(), known)


def _shares(logits: Tensor, target: Tensor) -> Tensor:
    known = ~target.isnan()
    right = torch.where(known, target, 0.0)
    count = known.flatten(1).sum(1).clamp(min=1)
    beta = (1 - right.flatten(1).sum(1) / count)[:, None, None]
    values = beta * right * F.softplus(-logits) + (1 - beta) * (1 - right) * F.softplus(logits)
    return _mean(values, known)


def _mean(values: Tensor, known: Tensor) -> Tensor:
    """Over the known pixels of each picture, [N, H, W] → [N]; what is not known has no gradient."""
    kept = torch.where(known, values, 0.0).flatten(1)
    return kept.sum(1) / known.flatten(1).sum(1).clamp(min=1)
