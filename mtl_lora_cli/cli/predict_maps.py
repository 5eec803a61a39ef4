"""`mtl-lora predict` of runs whose answers are maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl_lora_cli.cli.frame import as_json, emit, say, status
from mtl_lora_cli.errors import UsageError

if TYPE_CHECKING:
    from mtl_lora_cli.runs.folder import RunFolder
    from mtl_lora_cli.tasks.maps import MapSpec
    from mtl_lora_cli.tasks.task import Task

FORMATS = ("png", "npy")
_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".npy")


def predict_maps(
    folder: RunFolder,
    known: Mapping[str, Task],
    file: str,
    task: str | list[str] | None,
    *,
    form: str,
    output: Path | None,
    force: bool,
) -> None:
    """Write the maps of pictures, a line of JSON for each, as soon as it is there.

    Args:
        folder: of the run.
        known: its tasks by name.
        file: a picture, a folder of pictures, or rows.
        task: that answers, several, or all.
        form: of the files.
        output: where they go.
        force: see `open_run`.

    Raises:
        UsageError: a picture cannot be read, or two of them would be written to one file.
    """
    from mtl_lora_cli.evaluation.map_predictor import MapPredictor, encoded_map
    from mtl_lora_cli.evaluation.opened import open_run
    from mtl_lora_cli.runs.atomic import write_bytes
    from mtl_lora_cli.runs.paths import require_writable
    from mtl_lora_cli.tasks.chosen import require_task, several_tasks

    names = list(known)
    several = several_tasks(names, task, None)
    assert several is not None or not isinstance(task, list)
    chosen = several or [require_task(names, task if isinstance(task, str) else None, None)]
    pictures = dict(_pictures(file, known[chosen[0]]))
    place = output or Path("predictions") / folder.name
    require_writable(place, f"--output {place}")
    status(f"loading run {folder.name}")
    predictor = MapPredictor(open_run(folder, force=force))
    answers = predictor.each(pictures.values(), chosen)
    for (stem, picture), found in zip(pictures.items(), answers, strict=True):
        for name in chosen:
            path = place / name / f"{stem}.{form}"
            path.parent.mkdir(parents=True, exist_ok=True)
            values, spec = found[name]["map"], predictor.specs[name]
            write_bytes(path, encoded_map(values, spec, form))
            line = {"image": str(picture), "task": name, "map": str(path)}
            emit(as_json({**line, "size": list(values.shape[:2]), **_coding(spec, form)}))
    say(f"{place}: maps of {len(pictures):,} pictures")


def _coding(spec: MapSpec, form: str) -> dict[str, Any]:
    """How a PNG of depth is to be read."""
    if spec.objective != "depth" or form != "png":
        return {}
    return {"range": [spec.low, spec.high], "scale": spec.scale, "bits": 16}


def _pictures(file: str, task: Task) -> Iterator[tuple[str, Path]]:
    """Of each picture where its map goes, without an ending, and its path.

    Raises:
        UsageError: there is none, or two would go to one place.
    """
    seen: dict[str, Path] = {}
    for stem, path in _found(file, task):
        if stem in seen:
            raise UsageError(f"{seen[stem]} and {path} would be written to one file: {stem}")
        seen[stem] = path
        yield stem, path
    if not seen:
        raise UsageError(f"{file}: no picture; expected files that end in {', '.join(_ENDINGS)}")


def _found(file: str, task: Task) -> Iterator[tuple[str, Path]]:
    from mtl_lora_cli.data.file_formats import read_file
    from mtl_lora_cli.data.picture_rows import picture_address
    from mtl_lora_cli.pictures.decode import Site, locate

    path = Path(file)
    if path.is_dir():
        for one in sorted(path.rglob("*")):
            if one.suffix.lower() in _ENDINGS and one.is_file():
                yield one.relative_to(path).with_suffix("").as_posix(), one
    elif not path.is_file():
        raise UsageError(
            f"{file}: no such file or folder; expected a picture, a folder of them, or rows"
        )
    elif path.suffix.lower() in _ENDINGS:
        yield path.stem, path
    else:
        rows = read_file(path)
        for number, row in enumerate(rows.rows):
            where = rows.where(number)
            address = picture_address(task, row, where)
            if "#" in address:
                raise UsageError(
                    f"{where}: image: '{address}': pictures inside of files are not predicted"
                )
            one = locate(path.parent, address, Site(where, "image"))
            yield Path(address).with_suffix("").as_posix(), one
