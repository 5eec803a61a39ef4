"""`mtl-lora data show` of tasks whose answers are maps: pictures with what is learned over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mtl_lora_cli.cli.frame import emit

if TYPE_CHECKING:
    import numpy as np

    from mtl_lora_cli.data.maps import MapDataset
    from mtl_lora_cli.tasks.maps import MapSpec
    from mtl_lora_cli.tasks.task import Task
    from mtl_lora_cli.training.prepared import Prepared

_HEIGHT = 240  # pixels of what is written


def show_maps(prepared: Prepared, tasks: Sequence[Task], count: int, folder: Path) -> None:
    """Write pictures and print, of each, what its map holds.

    Args:
        prepared: a recipe with all its data.
        tasks: some of its tasks.
        count: pictures of each.
        folder: where they go: NUMBER-TASK.png, the picture and its map over it, as it is and as step 1 of the run
            sees it.

    Raises:
        UsageError: the folder cannot be written, or a file is wrong.
    """
    import numpy as np

    from mtl_lora_cli.models.host import at_step
    from mtl_lora_cli.pictures.drawn import side_by_side
    from mtl_lora_cli.runs.atomic import write_bytes
    from mtl_lora_cli.runs.paths import require_writable
    from mtl_lora_cli.tasks.maps import spec_of

    require_writable(folder, f"--output {folder}")
    made: Any = prepared.objective
    every = cast("MapDataset", made.dataset("train"))
    moved = cast("MapDataset", at_step(every, 0, 0))
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        spec, entry = spec_of(task.template), every.entries[task.id]
        for number in list(every.pictures_of(task.id))[:count]:
            whole, seen = every.show(entry, number, whole=True), moved.show(entry, number)
            parts: list[np.ndarray] = []
            for one in (whole, seen):
                parts += [one.pixels, _over(one.pixels, one.maps[task.id], spec)]
            path = folder / f"{number:04d}-{task.name}.png"
            write_bytes(path, side_by_side([np.ascontiguousarray(p) for p in parts], _HEIGHT))
            said = ": ".join(
                [str(path), every.where(entry, number), ", ".join(_told(whole.maps[task.id], spec))]
            )
            emit(said.removesuffix(": "))


def _over(pixels: np.ndarray, values: np.ndarray, spec: MapSpec) -> np.ndarray:
    """A map in colours, laid half over its picture."""
    import numpy as np

    from mtl_lora_cli.pictures.drawn import coloured

    known = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    low, high = (
        (float(known.min()), float(known.max()) + 1e-6)
        if spec.objective == "depth" and known.size
        else (0.0, 1.0)
    )
    shown = coloured(values, spec.objective, spec.channels, low, high)
    return (pixels.astype(np.uint16) // 3 + shown.astype(np.uint16) * 2 // 3).astype(np.uint8)


def _told(values: np.ndarray, spec: MapSpec) -> Iterator[str]:
    """What a map holds, in words."""
    import numpy as np

    if spec.of_classes:
        counts = np.bincount(values[values >= 0].ravel().astype(np.int64), minlength=spec.channels)
        for number in np.argsort(-counts, kind="stable")[:4]:
            if counts[number]:
                yield f"{spec.classes[number]} {counts[number] / values.size:.0%}"
        unknown = (values < 0).mean()
    else:
        known = np.isfinite(values)
        unknown = 1 - known.mean()
        if spec.objective in ("edges", "saliency") and known.any():
            yield f"marked {(values[known] >= 0.5).mean():.1%}"
        elif spec.objective == "depth" and known.any():
            yield f"{values[known].min():.2f} to {values[known].max():.2f}"
    if unknown:
        yield f"not known {unknown:.0%}"
