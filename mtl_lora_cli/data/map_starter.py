"""A first recipe for a folder of pictures and maps: classes are counted, sizes looked at, templates written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtl_lora_cli.data.layouts import layout_rows
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.pictures.decode import Site, picture_size, read_map
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.recipe.yaml_file import parse_document, validate_document
from mtl_lora_cli.tasks.maps import MAPS, OF_CLASSES

_TARGETS = {
    "swinv2": ["query", "value"],
    "hiera": ["qkv"],
    "convnext": ["pwconv1", "pwconv2"],
}
_LARGE = 224  # pixels of the longer side that is learned
_VOID = 255


@dataclass(frozen=True)
class MapStart:
    """A task as it is asked for: `NAME=segmentation:FOLDER`.

    Attributes:
        name: of the task; a folder of maps of that name is taken, or the only one.
        objective: of `MAPS`.
        folder: of pictures and maps.
    """

    name: str
    objective: str
    folder: Path


def read_map_task(text: str) -> MapStart | None:
    """A task of maps; None: another one.

    Raises:
        UsageError: there is no such folder.
    """
    name, _, rest = text.partition("=")
    objective, _, folder = rest.partition(":")
    if objective not in MAPS:
        return None
    if not name or not folder:
        raise UsageError(f"--task {text}: expected NAME={objective}:FOLDER")
    if not Path(folder).is_dir():
        raise UsageError(f"--task {text}: no such folder: {folder}")
    return MapStart(name, objective, Path(folder).resolve())


def map_recipe(base_model: str, tasks: Sequence[MapStart], output: Path) -> dict[Path, str]:
    """The recipe and a template for each task, as file → text.

    Args:
        base_model: a backbone.
        tasks: at least one.
        output: the recipe's file; templates go beside it.

    Raises:
        UsageError: a folder is laid out otherwise, a map cannot be read, or there is no such model.
    """
    place = output.resolve().parent
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise UsageError("--task: two tasks have the same name")
    files: dict[Path, str] = {}
    counts = []
    for task in tasks:
        text, size, pictures = _template(task)
        files[place / f"{task.name}.yaml"] = text
        counts.append((size, pictures))
    size, most = counts[0][0], max(count for _, count in counts)
    recipe = "\n".join(_lines(base_model, tasks, size, most, place)) + "\n"
    validate_document(parse_document(recipe, str(output)), Recipe)
    return {output: recipe, **files}


def _template(task: MapStart) -> tuple[str, tuple[int, int], int]:
    """A task's template, a picture's size, and how many pictures are learned."""
    rows = layout_rows(task.folder, "folders", "train", task.name)
    if rows is None:
        raise UsageError(f"--task {task.name}: {task.folder} has no picture to learn")
    fields = sorted({key for row in rows.rows for key in row} - {"image"})
    field = task.name if task.name in fields else fields[0] if len(fields) == 1 else None
    if field is None:
        said = ", ".join(fields) or "none"
        raise UsageError(
            f"--task {task.name}: expected a folder '{task.name}' of maps beside 'images', there are: {said}"
        )
    learned = [
        (row, where) for row, where in zip(rows.rows, rows.places, strict=True) if field in row
    ]
    size = picture_size(task.folder, learned[0][0]["image"], Site(learned[0][1], "image"))
    lines = [
        f"description: {task.objective} of the pictures of {task.folder.name}.",
        f"objective: {task.objective}",
        "image: image",
        f"target: {field if field.isidentifier() else f'row[{field!r}]'}",
    ]
    if task.objective in OF_CLASSES:
        lines += _classes(task, [(row[field], where) for row, where in learned])
    if task.objective == "depth":
        lines += [
            "# What the least and the largest stored value mean: metres, say.",
            "range: [0.1, 10.0]",
        ]
    return "\n".join(lines) + "\n", size, len(learned)


def _classes(task: MapStart, addresses: Sequence[tuple[str, str]]) -> list[str]:
    """Names from classes.txt or classes.json, else numbers; 255 is ignored where it stands."""

    def values(one: tuple[str, str]) -> np.ndarray:
        raw = read_map(task.folder, one[0], Site(one[1], task.name), exact=True, colours=False)
        return np.unique(raw)

    with ThreadPoolExecutor(8) as pool:
        seen = {int(value) for found in pool.map(values, addresses) for value in found}
    void = _VOID in seen
    seen.discard(_VOID)
    names = _names(task.folder) or [f"class {n}" for n in range(max(seen, default=0) + 1)]
    if seen == {0} or not seen:
        marked = "; 0 and 255: objective saliency learns such masks" if void else ""
        raise UsageError(f"--task {task.name}: its maps hold one class alone{marked}")
    lines = [
        "# What each value means, from 0.",
        f"classes: {json.dumps(names, ensure_ascii=False)}",
    ]
    return [*lines, "# The value that means: not known.", f"ignore: {_VOID}"] if void else lines


def _names(folder: Path) -> list[str]:
    if (folder / "classes.json").is_file():
        found = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
        return [str(name) for name in found] if isinstance(found, list) else []
    if (folder / "classes.txt").is_file():
        lines = (folder / "classes.txt").read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()]
    return []


def _lines(
    base_model: str, tasks: Sequence[MapStart], size: tuple[int, int], pictures: int, place: Path
) -> list[str]:
    base = find_base_model(base_model)
    config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    kind = str(config.get("model_type"))
    unit = int(config.get("patch_size") or 32) if kind.startswith("dinov2") else 32
    scale = _LARGE / max(size)
    height, width = (max(unit, unit * round(side * scale / unit)) for side in size)
    lines = [
        "# A first recipe, to be changed: docs/recipes.md has all keys, docs/dense.md those of maps.",
        "# Data are looked at by `mtl-lora validate` and `mtl-lora data show`; nothing is trained by them.",
        "",
        "# An alias, a folder, or a hub id.",
        f"base_model: {json.dumps(base_model)}",
        "",
        "images:",
        "  # Height and width at which pictures are learned.",
        f"  size: [{height}, {width}]",
        "  # Half of the pictures are mirrored, with all their maps.",
        "  augment: {flip: true}",
        "",
        "adapter:",
        "  # docs/method.md has the others; mtlora gives tasks parts of their own.",
        "  method: lora",
        "  # Rows of A.",
        "  rank: 8",
        "  # The update is scaled by alpha / rank.",
        "  alpha: 16",
        "  # The layers that are adapted.",
        f"  target_modules: {json.dumps(_TARGETS.get(kind, ['q_proj', 'v_proj']))}",
        "",
        "tasks:",
    ]
    for number, task in enumerate(tasks):
        lines += ["  # Its template is the file beside this recipe."] if number == 0 else []
        lines += [
            f"  - name: {task.name}",
            *(["    # What its maps mean."] if number == 0 else []),
            f"    template: {task.name}.yaml",
            *(["    # Pictures in images/, maps beside it."] if number == 0 else []),
            f"    source: {{path: {json.dumps(_near(task.folder, place))}, layout: folders}}",
        ]
    each = 8 if pictures >= 16 else 2
    epochs = max(4, min(60, round(1200 / max(1, pictures / each))))
    return [
        *lines,
        "",
        "training:",
        f"  # {pictures:,} pictures, gone over so often.",
        f"  epochs: {epochs}",
        "  # Adam's peak rate, reached after the warm-up and lowered to zero along a cosine.",
        "  learning_rate: 1.0e-3",
        "  # Pictures in an optimiser step, over all processes.",
        f"  rows_per_step: {each}",
        "  # Pictures that go through the model together.",
        f"  rows_per_pass: {each}",
        "  # Steps between two checkpoints.",
        "  checkpoint_every: 200",
        "  # Of every draw and every random start.",
        "  seed: 0",
    ]


def _near(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
