"""Pictures in, maps at their own size out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mtl_lora_cli.evaluation.maps import Answering
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.pictures.decode import Site, read_picture
from mtl_lora_cli.pictures.written import class_png, depth_codes, normal_bytes, npy, png
from mtl_lora_cli.tasks.chosen import require_task, several_tasks
from mtl_lora_cli.tasks.maps import MapSpec, spec_of

Picture = str | Path | np.ndarray | Image.Image


class MapPredictor:
    """A finished run that answers pictures with maps; `mtl_lora_cli.load` makes one.

    A picture is a path, an array uint8 [H, W, 3], or an image of Pillow's. A prediction is a dictionary:

    - `task`;
    - `map`: classes int16 [H, W], counted from 0; depth float32 [H, W] in its unit; edges and salience as
      probabilities float32 [H, W]; normals of length 1 float32 [H, W, 3]. H and W are the picture's own.
    - `classes`: their names, of a map of classes.

    Args:
        opened: the run with its model.
    """

    def __init__(self, opened: Run) -> None:
        self._answering = Answering(opened)
        self._ids = {task.name: task.id for task in opened.tasks}
        self.specs: Mapping[str, MapSpec] = {
            task.name: spec_of(task.template) for task in opened.tasks
        }

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the run's tasks."""
        return tuple(self._ids)

    def predict(
        self, pictures: Iterable[Picture], *, task: str | Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """Answer pictures.

        Args:
            pictures: in any number; several go through the model together, and all tasks of a picture at once.
            task: that answers; a list of several, or "all": then a prediction is a dictionary from each task's name to
                its prediction. May be left out where the run has one.

        Returns:
            A prediction for each picture, in order.

        Raises:
            UsageError: an unknown task, or a picture that cannot be read.
        """
        several = several_tasks(self.tasks, task, None)
        if several is None:
            assert task is None or isinstance(task, str)
            name = require_task(self.tasks, task, None)
            return [found[name] for found in self.each(pictures, [name])]
        return list(self.each(pictures, several))

    def each(
        self, pictures: Iterable[Picture], tasks: Sequence[str]
    ) -> Iterator[dict[str, dict[str, Any]]]:
        """Predictions by task for one picture after another; those to come are decoded meanwhile."""
        ids = [self._ids[name] for name in tasks]
        waiting = iter(enumerate(pictures, start=1))
        with ThreadPoolExecutor(8) as pool:
            size = self._answering.pictures_per_pass
            coming = [pool.submit(_opened, *one) for one in islice(waiting, 2 * size)]
            while coming:
                ready, coming = coming[:size], coming[size:]
                coming += [pool.submit(_opened, *one) for one in islice(waiting, size)]
                maps = self._answering.maps([one.result() for one in ready], ids)
                for found in maps:
                    yield {name: self._told(name, found[self._ids[name]]) for name in tasks}

    def _told(self, name: str, values: np.ndarray) -> dict[str, Any]:
        classes = self.specs[name].classes
        return {"task": name, "map": values, **({"classes": list(classes)} if classes else {})}


def _opened(number: int, picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    site = Site(f"picture {number}", "image")
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            shape = list(picture.shape)
            raise site.fault(f"received {picture.dtype} {shape}, expected uint8 [H, W, 3]")
        return Image.fromarray(picture)
    path = Path(picture)
    return read_picture(path.parent, path.name, Site(str(path), "image"))


def encoded_map(values: np.ndarray, spec: MapSpec, form: str) -> bytes:
    """A predicted map as a file's bytes; what is stored is read back by the task's own template.

    Args:
        values: see `MapPredictor`.
        spec: of the task.
        form: `png` or `npy`. PNGs of depth have 16 bits; of edges, salience and normals 8 a channel.
    """
    if spec.of_classes:
        stored = values.astype(np.uint16) + spec.first
        return npy(stored) if form == "npy" else class_png(stored, spec.first + len(spec.classes))
    if form == "npy":
        return npy(values)
    if spec.objective == "depth":
        return png(depth_codes(values, spec.low, spec.high, spec.scale))
    if spec.objective == "normals":
        return png(normal_bytes(values))
    return png(np.rint(values * 255).astype(np.uint8))
