"""Many small matrices, scaled and converted, written where they belong.

    target_i = round(s_i · source_i)

A launch takes longer than such a matrix: where all sources are float32 tensors that stay where they are, one
kernel writes them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """One matrix and where it goes.

    Attributes:
        source: [planes, rows, columns].
        target: the same shape, any dtype; its values of one row lie side by side.
        scale: s.
    """

    source: Tensor
    target: Tensor
    scale: float


def place_each(places: Sequence[Place]) -> None:
    """One after the other, in torch."""
    for source, target, scale in places:
        if scale == 1.0:
            target.copy_(source)
        else:
            torch.mul(source, scale, out=target)


def at_once(places: Sequence[Place]) -> bool:
    """Whether `triton_place` knows them: float32, contiguous, to one dtype of at most that."""
    kinds = {target.dtype for _, target, _ in places}
    return len(kinds) == 1 and all(
        source.dtype == torch.float32
        and source.is_contiguous()
        and target.stride(2) == 1
        and target.dtype in (torch.float32, torch.bfloat16, torch.float16)
        for source, target, _ in places
    )
