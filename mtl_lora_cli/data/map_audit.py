"""Every map of every split, looked at before anything is learned: classes, what is not known, what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mtl_lora_cli.data.picture_rows import MapRows, read_map_rows
from mtl_lora_cli.errors import MtlLoraError, Problem, ProblemsError
from mtl_lora_cli.pictures.derive import edges_from_classes
from mtl_lora_cli.recipe.source import SPLITS
from mtl_lora_cli.tasks.maps import MapSpec, spec_of
from mtl_lora_cli.tasks.task import Task

_TOLD = 20  # faults that are shown


@dataclass(frozen=True)
class MapCount:
    """What the maps of one split of a task hold.

    Attributes:
        task, split: whose they are.
        pictures, maps: how many there are.
        pixels: of all maps.
        unknown: of them, those of which nothing is known.
        classes: of a map of classes, pixels of each.
        low, high: of other maps the least and largest value; None where nothing is known.
    """

    task: str
    split: str
    pictures: int
    maps: int
    pixels: int
    unknown: int
    classes: dict[str, int]
    low: float | None
    high: float | None

    def lines(self) -> list[str]:
        """For a person."""
        lacking = f", {self.pictures - self.maps:,} have none" if self.maps < self.pictures else ""
        told = [
            f"{self.task}: {self.split}: {self.maps:,} maps{lacking}, "
            f"{self.unknown / max(1, self.pixels):.1%} of the pixels not known"
        ]
        if self.classes:
            every = max(1, self.pixels - self.unknown)
            shares = [
                f"{name} {count / every:.1%}" for name, count in self.classes.items() if count
            ]
            told[0] += f"; {', '.join(shares[:12])}" + (", …" if len(shares) > 12 else "")
            absent = [name for name, count in self.classes.items() if not count]
            if absent:
                more = ", …" if len(absent) > 12 else ""
                told.append(
                    f"{self.task}: {self.split}: no pixel of {', '.join(absent[:12])}{more}"
                )
        elif self.low is not None and self.high is not None and self.low >= 0:  # not of normals
            told[0] += f"; {self.low:.3g} to {self.high:.3g}"
        return told


def count_maps(tasks: Sequence[Task]) -> list[MapCount]:
    """All maps of all splits, read and counted.

    Raises:
        ProblemsError: files that are missing, broken, or hold what they must not, a line each.
    """
    faults: list[str] = []
    found = []
    for task in tasks:
        spec = spec_of(task.template)
        for split in SPLITS:
            sources = read_map_rows([replace(task, id=0)], [spec], split, masked=True)
            if sources:
                found.append(_counted(task, spec, split, sources[0].rows, faults))
    if faults:
        told = list(dict.fromkeys(faults))
        more = [f"and {len(told) - _TOLD:,} more"] if len(told) > _TOLD else []
        raise ProblemsError([_problem(line) for line in (*told[:_TOLD], *more)])
    return found


def _problem(line: str) -> Problem:
    file, _, message = line.partition(": ")
    return Problem(file, None, "", message)


def _counted(task: Task, spec: MapSpec, split: str, rows: MapRows, faults: list[str]) -> MapCount:
    numbers = np.flatnonzero(rows.present[:, 0]).tolist()

    def one(number: int) -> tuple[Any, str | None]:
        try:
            picture = rows.picture(number)
            values = rows.maps(number, [spec], picture)[0]
            if spec.derive == "classes":
                values = edges_from_classes(values)
            return _of_map(values, spec), None
        except MtlLoraError as error:
            return None, error.lines[0]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, numbers))
    faults += [fault for _, fault in results if fault is not None]
    good = [value for value, _ in results if value is not None]
    counts = np.sum([classes for _, _, classes, _, _ in good], axis=0) if good else []
    lows = [low for *_, low, _ in good if np.isfinite(low)]
    highs = [high for *_, high in good if np.isfinite(high)]
    return MapCount(
        task=task.name,
        split=split,
        pictures=len(rows.pictures),
        maps=len(numbers),
        pixels=sum(pixels for pixels, *_ in good),
        unknown=sum(unknown for _, unknown, *_ in good),
        classes=dict(zip(spec.classes, map(int, counts), strict=False)) if spec.classes else {},
        low=min(lows) if lows and not spec.classes else None,
        high=max(highs) if highs and not spec.classes else None,
    )


def _of_map(values: np.ndarray, spec: MapSpec) -> tuple[int, int, np.ndarray, float, float]:
    """Pixels, those that are not known, pixels of each class, and the least and largest value."""
    if spec.of_classes:
        known = values[values >= 0].astype(np.int64)
        counts = np.bincount(known, minlength=spec.channels)
        return values.size, values.size - known.size, counts, np.nan, np.nan
    flat = values.reshape(values.shape[0] * values.shape[1], -1)
    good = np.isfinite(flat).all(axis=1)
    kept = flat[good]
    low, high = (float(kept.min()), float(kept.max())) if kept.size else (np.nan, np.nan)
    return len(flat), int((~good).sum()), np.zeros(0), low, high
