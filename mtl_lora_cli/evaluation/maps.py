"""Maps, asked for and measured: each at its own size, and every trunk once for all tasks of a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mtl_lora_cli.data.map_batch import MapBatch, Normalisation
from mtl_lora_cli.data.picture_rows import MapRows, read_map_rows, split_print
from mtl_lora_cli.errors import LeftOutError, UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.machine import threads
from mtl_lora_cli.metrics import Outcome
from mtl_lora_cli.metrics.tallies import tally_of
from mtl_lora_cli.pictures.augment import WHOLE, seen_picture
from mtl_lora_cli.pictures.derive import edges_from_classes
from mtl_lora_cli.pictures.drawn import coloured, side_by_side
from mtl_lora_cli.tasks.maps import MAPS, MapSpec, spec_of
from mtl_lora_cli.tasks.task import Task

_ON_CARD, _ON_CPU = 32, 4  # pictures a pass
_THREADS = 8
_SHOWN, _SHOWN_HEIGHT = 3, 96  # pictures of each task, and their pixels
Progress = Callable[[int, int], None]


class MapHost(Protocol):
    """What answers pictures with maps."""

    def answers(self, batch: MapBatch, tasks: Sequence[int]) -> dict[int, Tensor]:
        """Task id → float32 [I, C, h, w]: logits, depth in its unit, normals of length 1."""


@dataclass(frozen=True)
class HeldMaps:
    """What a task of maps is evaluated on.

    Attributes:
        task, spec: whose maps they are.
        split: of the source.
        rows: pictures and maps, under the id 0.
        numbers: the pictures that have a map.
        fingerprint: of rows, pictures and maps.
    """

    task: Task
    spec: MapSpec
    split: str
    rows: MapRows
    numbers: Sequence[int]
    fingerprint: str

    def truth(self, number: int, picture: Image.Image | None = None) -> np.ndarray:
        """The right map at its own size.

        Raises:
            UsageError: a file is missing or wrong.
        """
        values = self.rows.maps(number, [self.spec], picture)[0]
        return edges_from_classes(values) if self.spec.derive == "classes" else values


def held_out_maps(task: Task, setting: Setting) -> HeldMaps:
    """The pictures that a task is evaluated on: test, or validation where there is no test split.

    Raises:
        LeftOutError: it has no such split, or the setting asks for what texts have.
        UsageError: a row is wrong.
    """
    if setting.base_only:
        raise LeftOutError(task.name, "a backbone alone gives no maps; --base-only is for texts")
    for option in ("protocol", "normalisation", "harness_task"):
        if getattr(setting, option) is not None:
            said = option.replace("_", "-")
            raise LeftOutError(task.name, f"--{said} is for texts; it is learned by maps")
    for split in [setting.split] if setting.split else ["test", "validation"]:
        found = read_held(task, split)
        if found is not None:
            return replace(found, numbers=found.numbers[: setting.limit])
    raise LeftOutError(
        task.name, f"its source has no {setting.split or 'test or validation'} split"
    )


def read_held(task: Task, split: str) -> HeldMaps | None:
    """One split of a task of maps; None where its source has none, or no map of it there.

    Raises:
        UsageError: a row is wrong.
    """
    spec = spec_of(task.template)
    sources = read_map_rows([replace(task, id=0)], [spec], split, masked=True)
    if not sources:
        return None
    rows = sources[0].rows
    numbers = np.flatnonzero(rows.present[:, 0]).tolist()
    return HeldMaps(task, spec, split, rows, numbers, split_print(rows)) if numbers else None


def require_maps(task: Task) -> None:
    """Refuse a task that is no map.

    Raises:
        UsageError: it is not.
    """
    if task.objective not in MAPS:
        raise UsageError(f"task '{task.name}': is learned by objective {task.objective}, no map")


class Answering:
    """Asks a run's host for maps.

    Args:
        opened: the run with its model.
    """

    def __init__(self, opened: Run) -> None:
        assert opened.recipe.images is not None, "a run of maps has a size"
        height, width = opened.recipe.images.shape
        self.size = (height, width)
        self._host = cast(MapHost, opened.host)
        self._normalise = Normalisation.of(opened.base.folder)
        self._device = opened.device
        self._specs = {task.id: spec_of(task.template) for task in opened.tasks}
        self._count = len(opened.tasks)
        self.pictures_per_pass = _ON_CARD if opened.device.type == "cuda" else _ON_CPU

    def ready(self, picture: Image.Image) -> np.ndarray:
        """A picture as the host takes it, float32 [3, h, w]."""
        return self._normalise(seen_picture(picture, WHOLE, self.size, self._normalise.fill))

    @torch.inference_mode()
    def raw(self, pixels: Sequence[np.ndarray], tasks: Sequence[int]) -> dict[int, Tensor]:
        """Task id → [I, C, h, w], as the host gives it."""
        threads.look(self._device)
        batch = MapBatch(
            pixels=torch.from_numpy(np.stack(pixels)),
            targets={},
            present=torch.zeros(len(pixels), self._count, dtype=torch.bool),
            owners=torch.zeros(0, dtype=torch.long),
            task_ids=torch.tensor(sorted(tasks), dtype=torch.long),
        )
        return self._host.answers(batch.to(self._device), list(tasks))

    def maps(
        self, pictures: Sequence[Image.Image], tasks: Sequence[int]
    ) -> list[dict[int, np.ndarray]]:
        """Of each picture task id → its map at the picture's own size; see `at_size`."""
        found = self.raw([self.ready(picture) for picture in pictures], tasks)
        return [
            {
                task: at_size(found[task][place], self._specs[task], (one.height, one.width))
                for task in tasks
            }
            for place, one in enumerate(pictures)
        ]


@torch.inference_mode()
def at_size(raw: Tensor, spec: MapSpec, size: tuple[int, int]) -> np.ndarray:
    """A host's answer [C, h, w] as a map of another size, interpolated before anything is decided.

    Returns:
        Classes int16 [H, W]; depth float32 [H, W]; edges and salience as probabilities float32 [H, W]; normals
        of length 1 float32 [H, W, 3].
    """
    large = F.interpolate(raw[None].float(), size=size, mode="bilinear", align_corners=False)[0]
    if spec.of_classes:
        return large.argmax(0).to(torch.int16).cpu().numpy()
    if spec.objective == "normals":
        unit = F.normalize(large, dim=0)
        return unit.permute(1, 2, 0).contiguous().cpu().numpy()
    if spec.objective == "depth":
        return large[0].cpu().numpy()
    return large[0].sigmoid().cpu().numpy()


@dataclass(frozen=True)
class MeasuredMaps:
    """What a run's answers to one task come to.

    Attributes:
        outcome: of all its pictures.
        shown: of the first ones picture, right map and answer side by side, as PNGs.
    """

    outcome: Outcome
    shown: list[bytes]


def measure_maps(
    opened: Run, held: Sequence[HeldMaps], advance: Progress = lambda done, total: None
) -> list[MeasuredMaps]:
    """What a run's answers come to on each task's pictures, at the maps' own size.

    Args:
        opened: the run with its model.
        held: of each task.
        advance: called with (maps done, maps in all).
    """
    asking = Answering(opened)
    tallies: list[list[np.ndarray]] = [[] for _ in held]
    shown: list[list[bytes]] = [[] for _ in held]
    total, done = sum(len(one.numbers) for one in held), 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for places in _by_pictures(held):
            of_task = {place: set(held[place].numbers) for place in places}
            rows, ids = held[places[0]].rows, [held[place].task.id for place in places]
            for some in _parts(sorted(set().union(*of_task.values())), asking.pictures_per_pass):
                pictures = list(pool.map(rows.picture, some))
                found = asking.raw(list(pool.map(asking.ready, pictures)), ids)
                for place in places:
                    own = [at for at, number in enumerate(some) if number in of_task[place]]
                    raw = found[held[place].task.id].cpu()
                    tallies[place] += pool.map(
                        _tallied,
                        [held[place]] * len(own),
                        [some[at] for at in own],
                        [pictures[at] for at in own],
                        [raw[at] for at in own],
                    )
                    for at in own[: _SHOWN - len(shown[place])]:
                        shown[place].append(_panel(held[place], some[at], pictures[at], raw[at]))
                    done += len(own)
                advance(done, total)
    outcomes = map(outcome_of_tallies, tallies)
    return [MeasuredMaps(*found) for found in zip(outcomes, shown, strict=True)]


def _panel(held: HeldMaps, number: int, picture: Image.Image, raw: Tensor) -> bytes:
    """Picture, right map and answer."""
    truth, spec = held.truth(number, picture), held.spec
    answer = at_size(raw, spec, (truth.shape[0], truth.shape[1]))
    known = truth[np.isfinite(truth)] if truth.dtype.kind == "f" else truth
    low, high = (
        (float(known.min()), float(known.max()) + 1e-6)
        if spec.objective == "depth" and known.size
        else (0.0, 1.0)
    )
    maps = [
        coloured(values, spec.objective, spec.channels, low, high) for values in (truth, answer)
    ]
    return side_by_side([np.asarray(picture), *maps], _SHOWN_HEIGHT)


def _parts(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


def _tallied(held: HeldMaps, number: int, picture: Image.Image, raw: Tensor) -> np.ndarray:
    """What is counted on one picture."""
    truth = held.truth(number, picture)
    height, width = truth.shape[:2]
    answer = at_size(raw, held.spec, (height, width))
    return tally_of(held.spec.objective, held.spec.channels)(truth, answer)


def outcome_of_tallies(tallies: Sequence[np.ndarray]) -> Outcome:
    """Tallies [K] of each image as what metrics are computed from."""
    none = np.zeros(len(tallies), dtype=np.int64)
    return Outcome(none, none, tallies=np.stack(tallies))


def _by_pictures(held: Sequence[HeldMaps]) -> list[list[int]]:
    """Places of the tasks with the same pictures: the trunk runs once for them."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, one in enumerate(held):
        key = (one.rows.root, one.split, tuple(one.rows.pictures))
        groups.setdefault(key, []).append(place)
    return list(groups.values())


@dataclass(frozen=True)
class Constant:
    """The best that says nothing of a picture: one answer for all pixels of all pictures, from training.

    Attributes:
        said: in words.
        value: the commonest class; the mean depth; the mean normal [3]; for edges and salience 1: all is marked.
    """

    said: str
    value: Any

    def map(self, size: tuple[int, int]) -> np.ndarray:
        """The answer for a picture."""
        kind = np.int16 if isinstance(self.value, int) else np.float32
        shape = (*size, *np.shape(self.value))
        return np.broadcast_to(np.asarray(self.value, dtype=kind), shape)


PICTURES_FOR_CONSTANT = 200


def constant_of(task: Task) -> Constant | None:
    """The constant answer of a task's training split, by 200 pictures at most; None where there are none."""
    held = read_held(task, "train")
    if held is None:
        return None
    spec, every = held.spec, held.numbers
    if spec.objective in ("edges", "saliency"):
        return Constant("everything marked", 1.0)
    step = max(1, len(every) // PICTURES_FOR_CONSTANT)
    truths = [held.truth(number) for number in every[::step][:PICTURES_FOR_CONSTANT]]
    if spec.of_classes:
        known = (one[one >= 0] for one in truths)
        counts = sum(np.bincount(one.astype(np.int64), minlength=spec.channels) for one in known)
        commonest = int(np.argmax(counts))
        return Constant(f"'{spec.classes[commonest]}' everywhere", commonest)
    flat = np.concatenate([one.reshape(-1, 3 if one.ndim == 3 else 1) for one in truths])
    mean = flat[np.isfinite(flat).all(1)].astype(np.float64).mean(0)
    if spec.objective == "depth":
        return Constant(f"{mean[0]:.3g} everywhere", float(mean[0]))
    return Constant("the mean normal everywhere", mean / max(np.linalg.norm(mean), 1e-12))


def constant_outcome(held: HeldMaps, constant: Constant) -> Outcome:
    """What a constant answer comes to on the same pictures."""
    count = tally_of(held.spec.objective, held.spec.channels)

    def tallied(number: int) -> np.ndarray:
        truth = held.truth(number)
        return count(truth, constant.map((truth.shape[0], truth.shape[1])))

    with ThreadPoolExecutor(_THREADS) as pool:
        return outcome_of_tallies(list(pool.map(tallied, held.numbers)))
