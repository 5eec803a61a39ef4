"""How written maps compare with the run's own, and what must hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_lora_cli.tasks.maps import MapSpec

ALLOWED = 1e-4  # of a map's range, in float32
EQUAL = 0.999  # share of pixels with the same class


@dataclass(frozen=True)
class MapDifference:
    """One task's maps beside the run's.

    Attributes:
        largest: largest difference, as a share of the map's range: of depth what its template says, of
            normals 2, of logits the run's largest less its smallest.
        equal: share of pixels with the same likeliest class; 1 where there are no classes.
    """

    largest: float
    equal: float

    @property
    def holds(self) -> bool:
        """NaN never does."""
        return self.largest <= ALLOWED and self.equal >= EQUAL


def difference(ours: Tensor, theirs: Tensor, spec: MapSpec) -> MapDifference:
    """Of what a run and what was written answer, [N, C, H, W]."""
    if ours.shape != theirs.shape or not bool(torch.isfinite(theirs).all()):
        return MapDifference(float("nan"), 0.0)
    largest = float((ours - theirs).abs().max()) / _range(ours, spec)
    if not spec.of_classes:
        return MapDifference(largest, 1.0)
    return MapDifference(largest, float((ours.argmax(1) == theirs.argmax(1)).double().mean()))


def _range(ours: Tensor, spec: MapSpec) -> float:
    if spec.objective == "depth":
        return spec.high - spec.low
    return 2.0 if spec.objective == "normals" else max(float(ours.max() - ours.min()), 1e-12)


def in_words(found: Mapping[str, MapDifference]) -> str:
    """A line of all tasks."""
    return "; ".join(
        f"{task}: largest difference {one.largest:.2e} of the range"
        + ("" if one.equal == 1 else f", equal classes {one.equal:.2%}")
        for task, one in found.items()
    )
