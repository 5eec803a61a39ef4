"""Tasks of a run inside the weights of their backbone: tensors that plain transformers and torch run.

| streams | trunk | of a task beside it |
| --- | --- | --- |
| `stages` | W + s B A everywhere | its own copy of the last block of each stage, W + s B A + s' B_t A_t; its decoder |
| one a task | W + ΔW_t | its decoder |
| one | W + ΔW, or what was tuned | its decoder |

Sums are taken in float64 and rounded once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.adapters.layer import TaskLayer
from mtl_lora_cli.dense.backbones import Stages
from mtl_lora_cli.dense.host import way_of
from mtl_lora_cli.errors import UsageError


@dataclass(frozen=True)
class MergedMaps:
    """A trunk and what tasks have beside it.

    Attributes:
        trunk: transformers' own model, without an adapter.
        tensors: `{task}.blocks.{stage}.{name}` of its own last blocks, `{task}.decoder.{name}`.
    """

    trunk: Any
    tensors: Mapping[str, Tensor]


def merged_maps(trunk: Any, stages: Stages, adapter: Adapter, tasks: Sequence[str]) -> MergedMaps:
    """Some tasks of an adapter merged.

    Args:
        trunk: the backbone as it was before training, on the adapter's device; its weights become others.
        stages: where they end.
        adapter: what was learned.
        tasks: by name.

    Raises:
        UsageError: each of several tasks has a trunk of its own.
    """
    way = way_of(adapter)
    require_one_trunk(adapter, tasks)
    for name, value in adapter.whole.items():
        _set(trunk.get_parameter(name), value)
    blocks = [copy.deepcopy(trunk.get_submodule(path)) for path in stages.blocks]
    number = adapter.tasks.index(tasks[0])
    for path, layer in adapter.layers.items():
        update = common_update(layer) if way == "stages" else task_update(layer, number)
        _add(trunk.get_submodule(path), update)
    found: dict[str, Tensor] = {}
    for task in tasks:
        if way == "stages":
            found |= _own_blocks(blocks, stages, adapter, task)
        for name, value in adapter.decoders[task].named_parameters():
            found[f"{task}.decoder.{name}"] = value.detach().clone()
    return MergedMaps(trunk, found)


def require_one_trunk(adapter: Adapter, tasks: Sequence[str]) -> None:
    """Refuse several tasks that have no trunk in common.

    Raises:
        UsageError: naming what would do.
    """
    if way_of(adapter) == "tasks" and len(tasks) > 1:
        raise UsageError(
            "without adapter.streams each task has a whole trunk of its own, and one folder holds one: "
            "merge one task at a time"
        )


def _own_blocks(
    blocks: Sequence[Any], stages: Stages, adapter: Adapter, task: str
) -> dict[str, Tensor]:
    found, number = {}, adapter.tasks.index(task)
    for stage, (block, place) in enumerate(zip(blocks, stages.blocks, strict=True)):
        own = copy.deepcopy(block)
        for path, layer in adapter.layers.items():
            if path.startswith(f"{place}."):
                _add(own.get_submodule(path.removeprefix(f"{place}.")), task_update(layer, number))
        for name, value in own.state_dict().items():
            found[f"{task}.blocks.{stage}.{name}"] = value.detach().clone()
    return found


def task_update(layer: TaskLayer, task: int) -> Tensor:
    """ΔW_t [out, in], float64."""
    down, up = layer.task_update(task)
    return layer.config.scale(layer.rank) * (up @ down)


def common_update(layer: TaskLayer) -> Tensor:
    """s B A [out, in] of what all tasks share, float64."""
    none = torch.zeros(0, dtype=torch.long, device=layer.lora_A.device)
    down, up = (factor.detach().double() for factor in layer.factors(none))
    return layer.config.scale(layer.rank) * (up.permute(1, 0, 2).flatten(1) @ down.flatten(0, 1))


@torch.no_grad()
def _add(layer: Any, update: Tensor) -> None:
    layer.weight.copy_((layer.weight.double() + update).to(layer.weight.dtype))


@torch.no_grad()
def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)
