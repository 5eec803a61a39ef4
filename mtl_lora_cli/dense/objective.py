"""What learns maps of pictures: the objectives of `tasks/maps.py`, from their data to their host."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mtl_lora_cli.adapters.inject import inject, whole_parameters
from mtl_lora_cli.data.maps import MapDataset, Normalisation
from mtl_lora_cli.dense.backbones import (
    Size,
    backbone_skeleton,
    family_of,
    load_backbone,
    require_size,
)
from mtl_lora_cli.dense.host import DenseHost
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.host import objective
from mtl_lora_cli.models.load import load_config
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.tasks.maps import MAPS, spec_of
from mtl_lora_cli.tasks.task import Task


@objective(*MAPS)
class DenseObjective:
    """See the module and `models.host.Objective`."""

    def __init__(self, base: BaseModel, recipe: Recipe, tasks: Sequence[Task]) -> None:
        if recipe.images is None:
            raise UsageError(
                f"images: is required with objective {tasks[0].objective}: images: {{size: [224, 224]}}"
            )
        self._base, self._recipe, self._tasks = base, recipe, tasks
        self._specs = [spec_of(task.template) for task in tasks]
        self.size: Size = (recipe.images.size[0], recipe.images.size[1])
        require_size(base, load_config(base), self.size)
        self._unquantised = self._tried_without_weights()

    def _tried_without_weights(self) -> list[str]:
        """Whether the adapter fits the backbone, before anything is read; linear layers that learn whole."""
        skeleton = backbone_skeleton(self._base)
        whole = whole_parameters(skeleton, self._recipe.adapter)
        with torch.device("meta"):
            inject(skeleton, self._recipe.adapter, [task.name for task in self._tasks])
        return [name.removesuffix(".weight") for name in whole if name.endswith(".weight")]

    def dataset(self, split: str) -> MapDataset | None:
        """See `Objective`."""
        assert self._recipe.images is not None
        return MapDataset.read(
            self._tasks,
            self._specs,
            split,
            self._recipe.images,
            Normalisation.of(self._base.folder),
            seed=self._recipe.training.seed,
        )

    def host(self, device: torch.device, dtype: torch.dtype) -> DenseHost:
        """See `Objective`."""
        trunk = load_backbone(
            self._base,
            size=self.size,
            dtype=dtype,
            device=device,
            quantization=self._recipe.quantization,
            unquantised=self._unquantised,
        )
        adapter = inject(trunk, self._recipe.adapter, [task.name for task in self._tasks])
        family = family_of(self._base, trunk.config)
        return DenseHost(trunk, family, adapter, self._specs, dtype)
