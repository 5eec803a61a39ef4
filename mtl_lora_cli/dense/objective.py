"""What learns maps of pictures: the objectives of `tasks/maps.py`, from their data to their host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from mtl_lora_cli.adapters.frozen import multiply_ourselves
from mtl_lora_cli.adapters.inject import Adapter, inject, whole_parameters
from mtl_lora_cli.data.map_batch import Normalisation
from mtl_lora_cli.data.maps import MapDataset
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

LEARNING = ("embeddings", "encoder")  # of a backbone: nothing reads the norm behind the last stage


@objective(*MAPS)
class DenseObjective:
    """See the module and `models.host.Objective`."""

    beyond: ClassVar = ("quantization", "training.memory", "distributed.zero_stage")

    def __init__(self, base: BaseModel, recipe: Recipe, tasks: Sequence[Task]) -> None:
        images = recipe.images
        if images is None or images.size is None:
            raise UsageError(
                f"images: is required with objective {tasks[0].objective}: images: {{size: [224, 224]}}"
            )
        self._base, self._recipe, self._tasks = base, recipe, tasks
        self.specs = [spec_of(task.template) for task in tasks]
        self.quantization = recipe.quantization
        self.size: Size = images.shape
        require_size(base, load_config(base), self.size)
        skeleton = backbone_skeleton(base)
        whole = whole_parameters(skeleton, recipe.adapter, LEARNING)
        self._unquantised = [name.removesuffix(".weight") for name in whole if "weight" in name]
        with torch.device("meta"):  # whether the adapter fits, before anything is read
            self._adapted(skeleton)

    def _adapted(self, trunk: Any) -> Adapter:
        """With streams, tasks have parts of their own in the last blocks of stages alone: elsewhere no stream
        of theirs runs."""
        config = self._recipe.adapter
        stages = family_of(self._base, trunk.config).stages(trunk.config)
        own = None if config.streams is None else stages.blocks
        names = [task.name for task in self._tasks]
        return inject(trunk, config, names, within=LEARNING, own_in=own)

    def dataset(self, split: str) -> MapDataset | None:
        """See `Objective`."""
        assert self._recipe.images is not None
        return MapDataset.read(
            self._tasks,
            self.specs,
            split,
            self._recipe.images,
            Normalisation.of(self._base.folder),
            seed=self._recipe.training.seed,
        )

    def host(self, device: torch.device, dtype: torch.dtype) -> DenseHost:
        """See `Objective`. On the meta device no weight is read."""
        trunk = self._trunk(device, dtype)
        adapter = self._adapted(trunk)
        multiply_ourselves(trunk)
        family = family_of(self._base, trunk.config)
        return DenseHost(trunk, family, adapter, self.specs, dtype)

    def _trunk(self, device: torch.device, dtype: torch.dtype) -> Any:
        if device.type == "meta":
            return backbone_skeleton(self._base, self.size).to(dtype).requires_grad_(False).eval()
        return load_backbone(
            self._base,
            size=self.size,
            dtype=dtype,
            device=device,
            quantization=self._recipe.quantization,
            storage=dtype if self._recipe.distributed.zero_stage == 3 else torch.uint8,
            unquantised=self._unquantised,
        )
