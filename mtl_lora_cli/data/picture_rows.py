"""Rows of pictures and maps: where each file lies, which maps there are, and what they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mtl_lora_cli.data.file_formats import Rows
from mtl_lora_cli.data.sources import read_split, root_of
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.pictures.decode import Site, locate, read_map, read_picture
from mtl_lora_cli.pictures.derive import normals_from_depth
from mtl_lora_cli.pictures.shown import file_digest
from mtl_lora_cli.pictures.values import as_classes, as_depth, as_normals, as_share
from mtl_lora_cli.tasks.jinja import Expression, explain
from mtl_lora_cli.tasks.maps import MapSpec, spec_of
from mtl_lora_cli.tasks.task import Task


@dataclass(frozen=True)
class MapRows:
    """One split of one source.

    Attributes:
        root: the folder that all paths lie in.
        pictures: the address of each picture.
        targets: task id → the address of each picture's map, None where it has none; of the tasks of this
            source.
        present: bool [pictures, T], which of all tasks' maps each picture has.
        wheres: file and line of each.
        fingerprint: of the rows; see `split_print` for the files.
    """

    root: Path
    pictures: Sequence[str]
    targets: Mapping[int, Sequence[str | None]]
    present: np.ndarray
    wheres: Sequence[str]
    fingerprint: str

    def picture(self, number: int) -> Image.Image:
        """In RGB.

        Raises:
            UsageError: the file is missing or wrong.
        """
        return read_picture(self.root, self.pictures[number], Site(self.wheres[number], "image"))

    def maps(
        self, number: int, specs: Sequence[MapSpec], picture: Image.Image | None = None
    ) -> dict[int, np.ndarray]:
        """The maps of one picture, as they mean something, at their own size.

        Args:
            number: of the picture.
            specs: of all tasks.
            picture: whose size the maps must have the sides of.

        Raises:
            UsageError: a file is missing or wrong.
        """
        found = {}
        for task, addresses in self.targets.items():
            address = addresses[number]
            if address is not None:
                site = Site(self.wheres[number], specs[task].objective)
                found[task] = read_target(self.root, address, specs[task], site)
                if picture is not None:
                    require_size(found[task], picture, site, address)
        return found


@dataclass(frozen=True)
class Source:
    """The tasks of one source, which learn together.

    Attributes:
        entry: the first of their ids: under it the pictures stand in the mixture.
        rows: pictures and maps.
    """

    entry: int
    rows: MapRows


def read_target(root: Path, address: str, spec: MapSpec, site: Site) -> np.ndarray:
    """One map as it means something: int16 classes, else float32; see `pictures.values`.

    Edges that are derived from classes are still classes here, as they are stored.

    Raises:
        UsageError: the file is missing or wrong, or a value is out of range.
    """
    stored = spec.stored
    exact = stored in ("segmentation", "parts")
    raw = read_map(root, address, site, exact=exact, colours=stored == "normals")
    if spec.derive == "classes":
        if raw.dtype.kind == "f" or (raw.size and raw.max() >= 2**15):
            raise site.fault(f"received {raw.dtype}, expected classes below {2**15:,}")
        return raw.astype(np.int16)
    if spec.of_classes:
        return as_classes(raw, spec.first, spec.channels, spec.ignore, site.fault)
    if stored == "depth":
        scale = (spec.low, spec.high, spec.scale, spec.bits)
        depth = as_depth(raw, *scale, spec.ignore, site.fault)
        return normals_from_depth(depth, spec.camera) if spec.derive else depth
    if stored == "normals":
        return as_normals(raw, spec.ignore, site.fault)
    low, high = (0.0, 1.0) if raw.dtype.kind == "f" and spec.high == 255 else (spec.low, spec.high)
    return as_share(raw, low, high, spec.ignore, site.fault)


def require_size(values: np.ndarray, picture: Image.Image, site: Site, address: str) -> None:
    """Refuse a map that cannot lie on its picture: a smaller one may, where its sides are to each other as
    the picture's.

    Raises:
        UsageError: another shape.
    """
    height, width = values.shape[:2]
    if (height, width) == (picture.height, picture.width):
        return
    if abs(height * picture.width - width * picture.height) > max(picture.width, picture.height):
        raise site.fault(
            f"'{address:.80}' is {height} x {width}, expected the picture's {picture.height} x "
            f"{picture.width}, or sides like them"
        )


def read_map_rows(
    tasks: Sequence[Task], specs: Sequence[MapSpec], split: str, *, masked: bool = False
) -> list[Source]:
    """The pictures of one split, by source.

    Args:
        tasks: with ids that count from 0.
        specs: what each task's map is.
        split: train, validation or test.
        masked: a picture may lack a map of each of these tasks.

    Raises:
        UsageError: a row is wrong, or tasks of one source differ in what they have in common.
    """
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(_key(task), []).append(task)
    found = []
    for own in groups.values():
        _require_alike(own)
        rows = read_split(own[0].source, split, base=Path(), task=own[0].name)
        if rows is not None:
            found.append(Source(own[0].id, _map_rows(own, rows, len(tasks), masked)))
    return found


def _key(task: Task) -> str:
    return f"{task.source.model_dump_json()} {task.template.image}"


def _require_alike(tasks: Sequence[Task]) -> None:
    """Refuse keys that say how often a picture is drawn, where tasks of one source differ in them.

    Raises:
        UsageError: naming two tasks.
    """
    first = tasks[0]
    for other in tasks[1:]:
        for key in ("max_examples", "repeat", "sampling_weight"):
            one, two = getattr(first, key), getattr(other, key)
            if one != two:
                raise UsageError(
                    f"tasks '{first.name}' and '{other.name}' learn from the same pictures: {key} is {one} and "
                    f"{two}, expected one value"
                )


def _map_rows(tasks: Sequence[Task], rows: Rows, count: int, masked: bool) -> MapRows:
    addresses: dict[int, list[str | None]] = {task.id: [] for task in tasks}
    readers = {task.id: _Addresses(task) for task in tasks}
    pictures: list[str] = []
    present = np.zeros((len(rows.rows), count), dtype=bool)
    for number, row in enumerate(rows.rows):
        where = rows.where(number)
        pictures.append(readers[tasks[0].id].picture(row, where))
        for task, reader in readers.items():
            address = reader.target(row, where)
            addresses[task].append(address)
            present[number, task] = address is not None
        if not masked and not present[number].any():
            names = ", ".join(task.name for task in tasks)
            raise Site(where, "target").fault(f"the picture has no map of any task ({names})")
    root = root_of(tasks[0].source, Path(), tasks[0].name)
    root = root.parent if root.is_file() else root
    return MapRows(root, pictures, addresses, present, rows.places, rows.fingerprint)


def split_print(rows: MapRows) -> str:
    """A hash of rows, pictures and maps: every byte of their files.

    Raises:
        UsageError: a file is missing.
    """
    whole = hashlib.sha256(rows.fingerprint.encode())
    for digest in (*_digests(rows, "image", rows.pictures), *_map_digests(rows)):
        whole.update(digest)
    return whole.hexdigest()[:16]


def map_print(task: Task, split: str) -> str | None:
    """`split_print` of one task; None where its source has no such split.

    Raises:
        UsageError: a row is wrong, or a file is missing.
    """
    spec = spec_of(task.template)
    found = read_map_rows([replace(task, id=0)], [spec], split, masked=True)
    return split_print(found[0].rows) if found else None


def leaks(tasks: Sequence[Task], specs: Sequence[MapSpec]) -> list[str]:
    """A line for each source that has pictures, byte for byte, in training and in held-out rows.

    Raises:
        UsageError: a row is wrong, or a file is missing.
    """
    seen: dict[bytes, str] = {}
    for source in read_map_rows(tasks, specs, "train"):
        for digest, where in zip(picture_digests(source.rows), source.rows.wheres, strict=True):
            seen.setdefault(digest, where)
    found = []
    for split in ("test", "validation"):
        for source in read_map_rows(tasks, specs, split):
            digests = picture_digests(source.rows)
            twice = [n for n, digest in enumerate(digests) if digest in seen]
            if twice:
                first, name = twice[0], tasks[source.entry].name
                found.append(
                    f"{name}: {len(twice):,} of {len(digests):,} {split} pictures are learned, too: "
                    f"{source.rows.wheres[first]} is the picture of {seen[digests[first]]}"
                )
    return found


def picture_digests(rows: MapRows) -> list[bytes]:
    """A hash of each picture's file: the same picture under two names has one.

    Raises:
        UsageError: a file is missing.
    """
    return _digests(rows, "image", rows.pictures)


def _map_digests(rows: MapRows) -> list[bytes]:
    return [
        digest
        for addresses in rows.targets.values()
        for digest in _digests(rows, "target", addresses)
    ]


def _digests(rows: MapRows, key: str, addresses: Sequence[str | None]) -> list[bytes]:
    def of(number: int) -> bytes:
        address = addresses[number]
        if address is None:
            return b"-"
        path = locate(rows.root, address, Site(rows.wheres[number], key))
        state = path.stat()
        inside = address.partition("#")[2].encode()
        return file_digest(str(path), state.st_size, state.st_mtime_ns) + inside

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(of, range(len(addresses))))


def picture_address(task: Task, row: Mapping[str, Any], where: str) -> str:
    """The path of a row's picture, by the task's template.

    Raises:
        UsageError: the row has none.
    """
    return _Addresses(task).picture(row, where)


class _Addresses:
    """What a task's template reads of a row."""

    def __init__(self, task: Task) -> None:
        template = task.template
        self._fields = {name: Expression(text) for name, text in template.fields.items()}
        self._image, self._target = (
            Expression(str(template.image)),
            Expression(str(template.target)),
        )

    def picture(self, row: Mapping[str, Any], where: str) -> str:
        """The picture's address.

        Raises:
            UsageError: the row has none.
        """
        site = Site(where, "image")
        found = self._address(self._image, row, site)
        if found is None:
            raise site.fault("is empty, expected the path of a picture")
        return found

    def target(self, row: Mapping[str, Any], where: str) -> str | None:
        """The map's address; None where the row has no such field, or nothing in it.

        Raises:
            UsageError: something else than a path stands there.
        """
        known = {*row, *self._fields, "row"}
        if not self._target.names <= known:
            return None
        return self._address(self._target, row, Site(where, "target"))

    def _address(self, expression: Expression, row: Mapping[str, Any], site: Site) -> str | None:
        variables: dict[str, Any] = {**row, "row": row}
        try:
            for name, compute in self._fields.items():
                variables[name] = compute(variables)
            value = expression(variables)
        except Exception as error:  # whatever the sandbox, a filter or Python has against it
            raise site.fault(explain(error, row)) from None
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise site.fault(f"expected a path, received {value!r:.60}")
        return value
