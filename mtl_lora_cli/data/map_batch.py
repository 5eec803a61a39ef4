"""Pictures and their maps together: as they are decoded, in few bytes, and as a host takes them.

What is decoded lies in memory that a card reads by itself; there it becomes numbers. So threads that decode write
each picture once, nobody copies it again, and a third less bytes travel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mtl_lora_cli.data.decoding import Block
from mtl_lora_cli.pictures.values import UNKNOWN
from mtl_lora_cli.tasks.maps import MapSpec

_ALIGNED = 64  # bytes: where parts of a room begin


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

    def together(self, pixels: Tensor) -> Tensor:
        """uint8 [I, h, w, 3] → float32 [I, 3, h, w], on the device where they are: everywhere the same bits."""
        table = torch.from_numpy(self.table).to(pixels.device, non_blocking=True)
        channels = [
            table[channel].index_select(0, pixels[..., channel].flatten().int())
            for channel in range(3)
        ]
        return torch.stack([one.view(pixels.shape[:3]) for one in channels], dim=1)


@dataclass
class MapBatch:
    """I pictures and their maps; owners and presence stay on the CPU.

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


class Room:
    """Memory for pictures and maps of a step, which threads fill.

    Args:
        count: pictures.
        size: height and width.
        specs: of the tasks that have maps here, by id.
        memory: uint8, of `Room.bytes_of` at least.
        block: whose memory it is, where another process writes it.
    """

    def __init__(
        self,
        count: int,
        size: tuple[int, int],
        specs: Mapping[int, MapSpec],
        memory: Tensor,
        block: Block | None = None,
    ) -> None:
        self.block, start = block, 0
        parts: dict[int | None, Tensor] = {}
        for task, shape, kind in Room._parts(count, size, specs):
            end = start + math.prod(shape) * kind.itemsize
            parts[task] = memory[start:end].view(kind).view(shape)
            start = -(-end // _ALIGNED) * _ALIGNED
        self.pixels = parts.pop(None)
        self.maps = {task: part for task, part in parts.items() if task is not None}

    @staticmethod
    def _parts(
        count: int, size: tuple[int, int], specs: Mapping[int, MapSpec]
    ) -> list[tuple[int | None, tuple[int, ...], torch.dtype]]:
        maps = [(task, (count, *size, *_channels(s)), _kind(s)) for task, s in specs.items()]
        return [(None, (count, *size, 3), torch.uint8), *maps]

    @staticmethod
    def bytes_of(count: int, size: tuple[int, int], specs: Mapping[int, MapSpec]) -> int:
        """Of its memory."""
        parts = Room._parts(count, size, specs)
        return sum(math.prod(shape) * kind.itemsize + _ALIGNED for _, shape, kind in parts)

    def put(self, place: int, pixels: np.ndarray, maps: Mapping[int, np.ndarray]) -> None:
        """One picture, uint8 [H, W, 3], and its maps; of the others nothing is known."""
        self.pixels.numpy()[place] = pixels
        for task, own in self.maps.items():
            nothing = UNKNOWN if own.dtype == torch.int16 else np.nan
            own.numpy()[place] = maps.get(task, nothing)


def _channels(spec: MapSpec) -> tuple[int, ...]:
    return (3,) if spec.objective == "normals" else ()


def _kind(spec: MapSpec) -> torch.dtype:
    return torch.int16 if spec.of_classes else torch.float32


@dataclass
class SeenBatch:
    """I pictures and their maps as they are decoded, on the CPU; `to` makes a `MapBatch` of them.

    Attributes:
        seen: uint8 [I, H, W, 3].
        maps: task id → int16 classes, or float32 with NaN where not known: [I, H, W], normals [I, H, W, 3].
        normalisation: the backbone's.
        present, owners, task_ids: as of `MapBatch`.
        rooms: where all that lies; it is nobody else's as long as this batch is there.
    """

    seen: Tensor
    maps: dict[int, Tensor]
    normalisation: Normalisation
    present: Tensor
    owners: Tensor
    task_ids: Tensor
    rooms: tuple[Room, ...] = ()

    @classmethod
    def of(
        cls,
        where: Sequence[tuple[Room, int]],
        present: np.ndarray,
        normalisation: Normalisation,
    ) -> SeenBatch:
        """The pictures at these places of rooms; bool [I, T] says which maps each has."""
        tasks = [int(task) for task in np.flatnonzero(present.any(0))]
        return cls(
            _gathered([(room.pixels, at) for room, at in where]),
            {task: _gathered([(room.maps[task], at) for room, at in where]) for task in tasks},
            normalisation,
            present=torch.from_numpy(present),
            owners=torch.from_numpy(np.nonzero(present)[1].astype(np.int64)),
            task_ids=torch.tensor(tasks, dtype=torch.long),
            rooms=tuple({id(room): room for room, _ in where}.values()),
        )

    def to(self, device: torch.device) -> MapBatch:
        """As a host takes it. A card fetches it beside what it is busy with."""
        if device.type != "cuda":
            lent = any(room.block is not None for room in self.rooms)  # others will write there
            copied = {task: one.clone() for task, one in self.maps.items()} if lent else self.maps
            return self._numbers(self.seen, copied)
        current, fetching = torch.cuda.current_stream(device), _fetching(device)
        with torch.cuda.stream(fetching):
            found = self._numbers(
                self.seen.to(device, non_blocking=True),
                {task: one.to(device, non_blocking=True) for task, one in self.maps.items()},
            )
        current.wait_stream(fetching)
        for room in self.rooms:
            if room.block is not None:
                room.block.read = fetching.record_event()
        for tensor in (found.pixels, *found.targets.values()):
            tensor.record_stream(current)
        return found

    def only(self, wanted: Tensor) -> Self:
        """The same pictures with some of their maps.

        Args:
            wanted: bool [I, T]; what a picture has no map of stays out.
        """
        present = self.present & wanted
        ids = present.any(0).nonzero().flatten()
        return replace(
            self,
            maps={task: self.maps[task] for task in ids.tolist()},
            present=present,
            owners=present.nonzero()[:, 1],
            task_ids=ids,
        )

    def by_task(self) -> list[Self]:
        """A batch of each task: all pictures, and its maps alone."""
        tasks = torch.arange(self.present.shape[1])
        return [self.only((tasks == task)[None]) for task in self.task_ids]

    def _numbers(self, seen: Tensor, maps: Mapping[int, Tensor]) -> MapBatch:
        return MapBatch(
            self.normalisation.together(seen),
            {task: _target(one) for task, one in maps.items()},
            self.present,
            self.owners,
            self.task_ids,
        )


def _gathered(where: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Without a copy where they follow each other in one memory, as those of a pass do."""
    (memory, first), count = where[0], len(where)
    if all(own is memory and at == first + i for i, (own, at) in enumerate(where)):
        return memory[first : first + count]
    return torch.stack([own[at] for own, at in where])


def _target(seen: Tensor) -> Tensor:
    if seen.ndim == 4:
        return seen.permute(0, 3, 1, 2).contiguous()
    return seen.long() if seen.dtype == torch.int16 else seen


_streams: dict[torch.device, Any] = {}


def _fetching(device: torch.device) -> Any:
    """The stream of a card in which batches come to it."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
