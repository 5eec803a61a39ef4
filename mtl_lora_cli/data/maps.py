"""Pictures and their maps as training takes them: rows, a dataset of the port, a batch.

Tasks of one source learn together: its pictures are one entry of the mixture, under the id of the source's
first task, and a picture's units are the maps that it has. A map that is missing is masked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mtl_lora_cli.data.mixture import generator_of
from mtl_lora_cli.data.picture_rows import Source, read_map_rows
from mtl_lora_cli.models.host import Rows
from mtl_lora_cli.pictures.augment import (
    WHOLE,
    View,
    draw_view,
    mirrored_classes,
    mirrored_normals,
    seen_map,
    seen_picture,
)
from mtl_lora_cli.pictures.derive import edges_from_classes
from mtl_lora_cli.recipe.schema import Images
from mtl_lora_cli.tasks.maps import MapSpec
from mtl_lora_cli.tasks.task import Task

_THREADS = max(2, min(16, os.cpu_count() or 2))  # most of decoding happens outside of Python's lock
_AHEAD = 4  # steps whose pictures are asked for before their time


@dataclass(frozen=True)
class Normalisation:
    """What a backbone expects of pixels: (v / 255 − mean) / std of each channel."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @classmethod
    def of(cls, folder: Path) -> Normalisation:
        """As the model's preprocessor_config.json says; ImageNet's where there is none."""
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            return cls()
        said = json.loads(path.read_text(encoding="utf-8"))
        if said.get("do_normalize") is False:
            return cls((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        mean, std = (said.get(key) for key in ("image_mean", "image_std"))
        return cls(tuple(mean), tuple(std)) if mean and std else cls()

    @property
    def fill(self) -> tuple[int, int, int]:
        """The colour of what lies outside of a picture: 0 after normalisation."""
        red, green, blue = (round(255 * value) for value in self.mean)
        return red, green, blue

    @cached_property
    def table(self) -> np.ndarray:
        """float32 [3, 256], the number that stands for each byte of each channel."""
        values = np.arange(256, dtype=np.float64)[None] / 255
        mean, std = (np.array(one)[:, None] for one in (self.mean, self.std))
        return ((values - mean) / std).astype(np.float32)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [h, w, 3] → float32 [3, h, w]."""
        return np.stack([self.table[channel].take(pixels[:, :, channel]) for channel in range(3)])


@dataclass(frozen=True)
class Shown:
    """One picture and its maps as they are learned.

    Attributes:
        pixels: uint8 [h, w, 3].
        maps: task id → int16 classes, or float32 with NaN where not known: [h, w], normals [h, w, 3].
    """

    pixels: np.ndarray
    maps: Mapping[int, np.ndarray]


@dataclass
class MapBatch:
    """I pictures and their maps, on the CPU until they are moved; owners and presence stay there.

    Attributes:
        pixels: float32 [I, 3, H, W], normalised by the backbone's mean and deviation.
        targets: task id → classes int64 [I, H, W] (−100: ignored); depth, edges and saliency float32
            [I, H, W], normals float32 [I, 3, H, W] (NaN: not known). Of a picture that has no such map nothing is
            known. A task that no picture has a map of is not there.
        present: bool [I, T], which maps each picture has.
        owners: int64 [S], the task of each unit (picture, task), picture by picture in the tasks' order.
        task_ids: int64 [tasks of the batch], those that some picture has a map of, rising.
    """

    pixels: Tensor
    targets: dict[int, Tensor]
    present: Tensor
    owners: Tensor
    task_ids: Tensor

    def to(self, device: torch.device) -> Self:
        """The batch on a device."""
        return replace(
            self,
            pixels=self.pixels.to(device, non_blocking=True),
            targets={task: one.to(device, non_blocking=True) for task, one in self.targets.items()},
        )


class MapDataset:
    """Pictures with maps, as the port has them.

    Args:
        tasks: of the run, in the order of their ids.
        specs: what each task's map is.
        sources: the pictures of each source.
        size: height and width of what is learned.
        images: the recipe's `images`; None: pictures are shown whole.
        normalisation: the backbone's.
        seed: of augmentation.
        moment: epoch and step, whose views are drawn.

    Attributes:
        lengths: of the first task of each source ones [pictures]; of the others nothing.
        entries: of each task the first one of its source.
        row_length: a row is one picture.
        steps_ahead: how many steps `ahead` is asked for before their time.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        specs: Sequence[MapSpec],
        sources: Sequence[Source],
        images: Images,
        normalisation: Normalisation,
        *,
        seed: int = 0,
        augmented: bool = False,
    ) -> None:
        self._tasks, self._specs, self._images = tasks, specs, images
        self._normalise, self._seed, self._augmented = normalisation, seed, augmented
        self._sources = {source.entry: source.rows for source in sources}
        self.size_of_pictures = (images.size[0], images.size[1])
        none = np.zeros(0, dtype=np.int64)
        self.lengths = [
            np.ones(len(self._sources[task].pictures), dtype=np.int64)
            if task in self._sources
            else none
            for task in range(len(tasks))
        ]
        self.row_length, self.steps_ahead = 1, _AHEAD
        first = {task: source.entry for source in sources for task in source.rows.targets}
        self.entries = [first.get(task, task) for task in range(len(tasks))]
        self._moment = (0, 0)
        self._pool: ThreadPoolExecutor | None = None
        self._asked: dict[tuple[int, int, int, int], Future[tuple[Shown, np.ndarray]]] = {}

    @classmethod
    def read(
        cls,
        tasks: Sequence[Task],
        specs: Sequence[MapSpec],
        split: str,
        images: Images,
        normalisation: Normalisation,
        *,
        seed: int = 0,
    ) -> MapDataset | None:
        """The pictures of a split; those of `train` are augmented. None where no task has such a split.

        Raises:
            UsageError: a row is wrong, or tasks of one source differ in what they must have in common.
        """
        sources = read_map_rows(tasks, specs, split)
        if not sources:
            return None
        train = split == "train"
        return cls(tasks, specs, sources, images, normalisation, seed=seed, augmented=train)

    @property
    def examples(self) -> list[int]:
        """Pictures that have a map of each task."""
        counts = np.zeros(len(self._tasks), dtype=np.int64)
        for rows in self._sources.values():
            counts += rows.present.sum(0)
        return [int(count) for count in counts]

    def at(self, epoch: int, step: int) -> MapDataset:
        """The same pictures, in the views of a step: they follow from seed, epoch, step and picture alone."""
        if self._pool is None:  # one for all steps
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="pictures")
        other = copy(self)
        other._moment = (epoch, step)
        return other

    def units(self, rows: Rows) -> Tensor:
        """Maps of each task, int64 [T]."""
        counts = np.zeros(len(self._tasks), dtype=np.int64)
        for row in rows:
            for entry, number in row:
                counts += self._sources[entry].present[number]
        return torch.from_numpy(counts)

    def size(self, rows: Rows) -> int:
        """Pictures."""
        return sum(map(len, rows))

    def view(self, entry: int, number: int) -> View:
        """How a picture is seen at this moment."""
        augment = self._images.augment
        if not self._augmented or augment is None:
            return WHOLE
        generator = generator_of(self._seed, "view", *self._moment, self._tasks[entry].name, number)
        low, high = augment.scale or (1.0, 1.0)
        return draw_view(augment.flip, (low, high), generator)

    def pictures_of(self, task: int) -> list[int]:
        """The pictures that have a map of a task, as its source counts them."""
        rows = self._sources.get(self.entries[task])
        return [] if rows is None else np.flatnonzero(rows.present[:, task]).tolist()

    def where(self, entry: int, number: int) -> str:
        """File and line of a picture."""
        return self._sources[entry].wheres[number]

    def show(self, entry: int, number: int, *, whole: bool = False) -> Shown:
        """One picture and its maps, decoded and changed as they are learned.

        Args:
            entry: the first task of its source.
            number: of the picture.
            whole: nothing is changed but the size.

        Raises:
            UsageError: a file is missing or wrong.
        """
        rows, size = self._sources[entry], self.size_of_pictures
        view = WHOLE if whole else self.view(entry, number)
        picture = rows.picture(number)
        maps = {
            task: seen_target(values, self._specs[task], view, size)
            for task, values in rows.maps(number, self._specs, picture).items()
        }
        return Shown(seen_picture(picture, view, size, self._normalise.fill), maps)

    def ahead(self, rows: Rows) -> None:
        """Begin to decode what `collate` will be asked for at this moment."""
        assert self._pool is not None, "at() comes first"
        for row in rows:
            for entry, number in row:
                key = (*self._moment, entry, number)
                if key not in self._asked:
                    self._asked[key] = self._pool.submit(self._ready, entry, number)

    def collate(self, rows: Rows) -> MapBatch:
        """See `MapBatch`."""
        places = [place for row in rows for place in row]
        if self._pool is not None:
            self.ahead(rows)
        shown, pixels = zip(*(self._found(entry, number) for entry, number in places), strict=True)
        present = np.stack([self._sources[entry].present[number] for entry, number in places])
        tasks = [int(task) for task in np.flatnonzero(present.any(0))]
        return MapBatch(
            pixels=torch.from_numpy(np.stack(pixels)),
            targets={
                task: _target([one.maps.get(task) for one in shown], self._specs[task])
                for task in tasks
            },
            present=torch.from_numpy(present),
            owners=torch.from_numpy(np.nonzero(present)[1].astype(np.int64)),
            task_ids=torch.tensor(tasks, dtype=torch.long),
        )

    def _found(self, entry: int, number: int) -> tuple[Shown, np.ndarray]:
        asked = self._asked.pop((*self._moment, entry, number), None)
        return self._ready(entry, number) if asked is None else asked.result()

    def _ready(self, entry: int, number: int) -> tuple[Shown, np.ndarray]:
        """One picture with its maps, and its pixels as the backbone expects them."""
        shown = self.show(entry, number)
        return shown, self._normalise(shown.pixels)


def seen_target(values: np.ndarray, spec: MapSpec, view: View, size: tuple[int, int]) -> np.ndarray:
    """A map as it is learned: the view's part of it, and what its values say after mirroring and scaling.

    Edges of classes are looked for after resizing, so that they stay a pixel wide. A picture that is shown
    at twice its size shows things as if they were at half the depth.
    """
    found = seen_map(values, view, size)
    if spec.derive == "classes":
        return edges_from_classes(found)
    if spec.objective == "depth":
        found = found / np.float32(view.scale)
    if view.flip and spec.objective == "normals":
        return mirrored_normals(found)
    return mirrored_classes(found, spec.left_right) if view.flip and spec.left_right else found


def _target(maps: Sequence[np.ndarray | None], spec: MapSpec) -> Tensor:
    """The maps of a batch; nothing is known of what is not there."""
    shape = next(one.shape for one in maps if one is not None)
    kind: Any = np.int64 if spec.of_classes else np.float32
    found = np.full((len(maps), *shape), -100 if spec.of_classes else np.nan, dtype=kind)
    for place, one in enumerate(maps):
        if one is not None:
            found[place] = one
    tensor = torch.from_numpy(found)
    return tensor.permute(0, 3, 1, 2).contiguous() if tensor.ndim == 4 else tensor
