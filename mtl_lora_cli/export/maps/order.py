"""A run of maps on its way out: what is asked for, and pictures to compare on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mtl_lora_cli.data.map_batch import MapBatch, Normalisation
from mtl_lora_cli.dense.backbones import Size
from mtl_lora_cli.dense.host import DenseHost
from mtl_lora_cli.dense.objective import DenseObjective
from mtl_lora_cli.dense.opened import open_host
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.export.order import Say
from mtl_lora_cli.tasks.maps import MapSpec, spec_of
from mtl_lora_cli.tasks.task import Task

_TOGETHER = 8  # pictures


@dataclass(frozen=True)
class MapsOrder:
    """Some tasks of a run of maps.

    Attributes:
        run: finished.
        tasks: which are written, together.
        folder: where to.
        limit: held-out pictures to compare on.
        checked: compare at all.
        say: called with progress lines.
    """

    run: Run
    tasks: Sequence[Task]
    folder: Path
    limit: int = 16
    checked: bool = True
    say: Say = lambda text: None

    @property
    def specs(self) -> dict[str, MapSpec]:
        """Task → what its map holds."""
        return {task.name: spec_of(task.template) for task in self.tasks}

    @property
    def size(self) -> Size:
        """Height and width that were learned."""
        images = self.run.recipe.images
        assert images is not None, "a run of maps has images"
        return images.shape

    @cached_property
    def normalisation(self) -> Normalisation:
        """Of the base model."""
        return Normalisation.of(self.run.base.folder)

    @cached_property
    def host(self) -> DenseHost:
        """The run itself, in float32 on the CPU, on the base model's original weights."""
        recipe = self.run.recipe.model_copy(update={"quantization": "none"})
        return open_host(
            self.run.base,
            recipe,
            self.run.tasks,
            self.run.file,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )

    @cached_property
    def pictures(self) -> Tensor:
        """Held-out pictures, float32 [N, 3, H, W].

        Raises:
            UsageError: there are none.
        """
        learned = DenseObjective(self.run.base, self.run.recipe, self.run.tasks)
        entries = {task.id for task in self.tasks}
        for split in ("validation", "test"):
            dataset = learned.dataset(split)
            if dataset is None:
                continue
            places = [
                (entry, number)
                for entry, lengths in enumerate(dataset.lengths)
                for number in range(len(lengths))
                if dataset.units([[(entry, number)]])[sorted(entries)].any()
            ][: self.limit]
            if places:
                parts = [places[i : i + _TOGETHER] for i in range(0, len(places), _TOGETHER)]
                return torch.cat(
                    [dataset.collate([part]).to(torch.device("cpu")).pixels for part in parts]
                )
        names = ", ".join(task.name for task in self.tasks)
        raise UsageError(
            f"task '{names}': its source has no validation or test split; --no-check writes without comparing"
        )

    @torch.no_grad()
    def answers(self) -> dict[str, Tensor]:
        """Task → what the run answers to `pictures`, float32 [N, C, H, W]."""
        found: dict[str, list[Tensor]] = {task.name: [] for task in self.tasks}
        ids = {task.id: task.name for task in self.tasks}
        for pixels in self.pictures.split(_TOGETHER):
            for task, answer in self.host.answers(unanswered(pixels), list(ids)).items():
                found[ids[task]].append(answer)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def but(self, **changes: object) -> MapsOrder:
        """The same, otherwise."""
        return replace(self, **changes)  # type: ignore[arg-type]


def unanswered(pixels: Tensor) -> MapBatch:
    """Pictures of which no map is known."""
    none = torch.zeros(0, dtype=torch.long)
    return MapBatch(pixels, {}, torch.zeros(len(pixels), 0, dtype=torch.bool), none, none)
