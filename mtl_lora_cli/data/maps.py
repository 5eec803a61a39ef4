"""Pictures and their maps as training takes them: rows, a dataset of the port, a batch.

Tasks of one source learn together: its pictures are one entry of the mixture, under the id of the source's
first task, and a picture's units are the maps that it has. A map that is missing is masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtl_lora_cli.data.decoding import Block, Decoding, possible
from mtl_lora_cli.data.epoch_rows import Place
from mtl_lora_cli.data.map_batch import Normalisation, Room, SeenBatch
from mtl_lora_cli.data.mixture import generator_of
from mtl_lora_cli.data.picture_rows import Source, read_map_rows
from mtl_lora_cli.machine.cores import DECODING_THREADS
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
from mtl_lora_cli.recipe.pictures import Images
from mtl_lora_cli.tasks.maps import MapSpec
from mtl_lora_cli.tasks.task import Task

_AHEAD = 4  # steps whose pictures are asked for before their time


@dataclass(frozen=True)
class Shown:
    """One picture and its maps as they are learned.

    Attributes:
        pixels: uint8 [h, w, 3].
        maps: task id → int16 classes, or float32 with NaN where not known: [h, w], normals [h, w, 3].
    """

    pixels: np.ndarray
    maps: Mapping[int, np.ndarray]


class _Asked(NamedTuple):
    """A picture that is being decoded: where it comes to, and who says when it is there; None: it is."""

    room: Room
    at: int
    filled: Future[None] | None


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
        self.size_of_pictures = images.shape
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
        self._decoding: Decoding | None = None
        self._asked: dict[tuple[int, int, int, int], _Asked] = {}

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
            self._decoding = Decoding.of(self.fill_memory) if possible() else None
            self._pool = ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="pictures")
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
        self._ask([place for row in rows for place in row])

    def collate(self, rows: Rows) -> SeenBatch:
        """See `SeenBatch`."""
        places = [place for row in rows for place in row]
        self._ask(places)
        asked = {place: self._asked.pop((*self._moment, *place)) for place in dict.fromkeys(places)}
        for one in asked.values():
            if one.filled is not None:
                one.filled.result()
        present = np.stack([self._sources[entry].present[number] for entry, number in places])
        where = [(asked[place].room, asked[place].at) for place in places]
        return SeenBatch.of(where, present, self._normalise)

    def _ask(self, places: Sequence[Place]) -> None:
        """Let those that nobody asked for be decoded into a room of their own: by threads, where there are some."""
        new = [p for p in dict.fromkeys(places) if (*self._moment, *p) not in self._asked]
        if not new:
            return
        size = Room.bytes_of(len(new), self.size_of_pictures, self._learned)
        if self._decoding is not None and (block := self._decoding.block(size)) is not None:
            room = self._room(len(new), block.memory, block)
            self._decoding.lend(block, room)
            filled = self._decoding.ask(block, self._moment, new)
            for at, place in enumerate(new):
                self._asked[(*self._moment, *place)] = _Asked(room, at, filled[at])
            return
        pinned = self._pool is not None and torch.cuda.is_initialized()  # steps on a card
        room = self._room(len(new), torch.empty(size, dtype=torch.uint8, pin_memory=pinned))
        for at, place in enumerate(new):
            if self._pool is None:
                self._fill(room, at, place)
            one = None if self._pool is None else self._pool.submit(self._fill, room, at, place)
            self._asked[(*self._moment, *place)] = _Asked(room, at, one)

    def _room(self, count: int, memory: Tensor, block: Block | None = None) -> Room:
        return Room(count, self.size_of_pictures, self._learned, memory, block)

    @property
    def _learned(self) -> dict[int, MapSpec]:
        tasks = sorted(task for rows in self._sources.values() for task in rows.targets)
        return {task: self._specs[task] for task in tasks}

    def _fill(self, room: Room, at: int, place: Place) -> None:
        shown = self.show(*place)
        room.put(at, shown.pixels, shown.maps)

    def fill_memory(self, memory: Tensor, count: int, at: int, moment: Place, place: Place) -> None:
        """See `decoding.Fill`: what another process does."""
        other = copy(self)
        other._moment = moment
        other._fill(other._room(count, memory), at, place)


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
