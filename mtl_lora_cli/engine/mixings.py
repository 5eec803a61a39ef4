"""M of many groups whose layers are of the same kinds, made together: a few launches, not a few each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_lora_cli.adapters.layer import TaskLayer, mixing_of
from mtl_lora_cli.adapters.routing import Slots
from mtl_lora_cli.engine.group import Group
from mtl_lora_cli.engine.stack_group import StackGroup


def mixing_of_groups(groups: Sequence[Group | StackGroup], slots: Slots) -> list[Tensor | None]:
    """M [J, P, m, k] of each group, or what else its way of mixing wants (`methods/base.py`); None: nothing.

    Args:
        groups: whose adapted layers are all of one kind, or of the same kinds in the same order. Where kinds
            differ, m and k are the largest ones, and zeros fill the others up.
        slots: the routing of what they are given.
    """
    layers: list[TaskLayer] = [one for group in groups for one in group.adapted]
    wanted, all_rows = slots.wanted, groups[0].all_tasks
    if len({one.kind for one in layers}) == 1:
        together = mixing_of(layers, wanted, all_rows=all_rows)
        if together is None:
            return [None] * len(groups)
        return list(together.split([sum(one.units for one in group.adapted) for group in groups]))
    columns = list(zip(*(group.adapted for group in groups), strict=True))
    found = [mixing_of(column, wanted, all_rows=all_rows) for column in columns]
    tasks = next((one.shape[1] for one in found if one is not None), None)
    if tasks is None:
        return [None] * len(groups)
    each = [
        _all_rows(column, tasks) if one is None else one
        for one, column in zip(found, columns, strict=True)
    ]
    sides = [max(one.shape[side] for one in each) for side in range(2, each[0].dim())]
    return list(torch.stack([_filled_up(one, sides) for one in each], dim=1).unbind())


@torch.no_grad()
def _all_rows(layers: Sequence[TaskLayer], tasks: int) -> Tensor:
    """What `own` wants of layers in which no task has a part of its own: bool [G, P, k], all true."""
    down = layers[0].factors(None)[0]
    shape = len(layers), tasks, down.shape[0] * down.shape[1]
    return torch.ones(shape, dtype=torch.bool, device=down.device)


def _filled_up(matrices: Tensor, sides: Sequence[int]) -> Tensor:
    """[G, P, …] with zeros up to these sides."""
    missing = [side - own for side, own in zip(sides, matrices.shape[2:], strict=True)]
    return F.pad(matrices, [count for one in reversed(missing) for count in (0, one)])
