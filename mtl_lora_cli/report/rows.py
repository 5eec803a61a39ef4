"""Held-out rows that a run answered right and wrong, read again from where its tasks come from."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtl_lora_cli.data.pictured import picture_root, split_print
from mtl_lora_cli.data.sources import Rows, read_split
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.evaluation.protocols import LM_EVAL
from mtl_lora_cli.pictures.shown import Picture
from mtl_lora_cli.tasks.pictured import unplaced
from mtl_lora_cli.tasks.rendering import Renderer
from mtl_lora_cli.tasks.task import Task

_ROWS = 3  # of each kind
_BEGIN, _END = 300, 200  # characters of a longer prompt
_PICTURES, _SIDE = 4, 128  # of a row, and pixels of the longer side
_GONE = "the rows are not readable any more"


_BASE64 = re.compile(r"[A-Za-z0-9+/=]+")


def answered(tasks: Sequence[Task], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some rows of each task's newest result of the adapter, evenly over the split.

    Returns:
        For each task `task`, `split`, `id` of the result, `right` and `wrong`: rows with `where`,
        `prompt`, `answer` and `predicted`, which is None where no choice was named, or where a free
        answer was another one, and `pictures`, what it shows, PNGs in base 64; and `note`, why there are none, or
        None. Of maps also `shown`: picture, right map and answer side by side, likewise.
    """
    found = []
    for task in tasks:
        own = [r for r in results if r["task"] == task.name and r["model"] == "adapter"]
        own = [r for r in own if r["protocol"] != LM_EVAL]  # asks rows of its own
        newest = max(own, key=lambda r: r["id"], default=None)
        if newest is not None and newest["protocol"] == "maps":
            head = {"task": task.name, "split": newest["split"], "id": newest["id"]}
            found.append({**head, "right": [], "wrong": [], "note": None, **_shown(newest)})
        elif newest is not None:
            found.append(_of_task(task, newest))
    return found


def _of_task(task: Task, result: dict[str, Any]) -> dict[str, Any]:
    kinds: dict[str, list[dict[str, Any]]] = {"right": [], "wrong": []}
    note = None
    try:
        rows = read_split(task.source, result["split"], base=Path(), task=task.name)
        if rows is None:
            note = f"{_GONE}: the source has no {result['split']} split"
        elif result["rows_fingerprint"] not in _prints(task, result["split"], rows):
            note = f"{_GONE}: they changed since the evaluation"
        else:
            kinds = _kinds(task, result, rows)
    except (MtlLoraError, OSError) as error:
        note = f"{_GONE}: {' '.join(str(error).split())}"
    head = {"task": task.name, "split": result["split"], "id": result["id"]}
    return {**head, **kinds, "note": note}


def _prints(task: Task, split: str, rows: Rows) -> list[str]:
    """How a result may know these rows: with the pictures that they show, where they show some."""
    if not task.template.images:
        return [rows.fingerprint]
    return [rows.fingerprint, split_print(task, split, rows.fingerprint)]


def _shown(result: dict[str, Any]) -> dict[str, list[str]]:
    """Pictures with right map and answer, PNGs in base 64."""
    panels = result.get("shown") or []
    return {
        "shown": [panel for panel in panels if isinstance(panel, str) and _BASE64.fullmatch(panel)]
    }


def _kinds(task: Task, result: dict[str, Any], rows: Rows) -> dict[str, list[dict[str, Any]]]:
    root = picture_root(task) if task.template.images else Path()
    renderer = Renderer(task.template, task.name, root)
    pairs = list(zip(result["gold"], result["predicted"], strict=True))
    found = {}
    for kind in ("right", "wrong"):
        numbers = [n for n, (gold, said) in enumerate(pairs) if (gold == said) == (kind == "right")]
        found[kind] = [_row(renderer, rows, n, pairs[n][1]) for n in _spread(numbers)]
    return found


def _spread(numbers: Sequence[int]) -> list[int]:
    """A few of them, from the whole length."""
    count = min(_ROWS, len(numbers))
    return [numbers[(2 * i + 1) * len(numbers) // (2 * count)] for i in range(count)]


def _row(renderer: Renderer, rows: Rows, index: int, predicted: int) -> dict[str, Any]:
    example = renderer.render(rows.rows[index], rows.where(index))
    if example.choices:
        said = example.choices[predicted] if predicted >= 0 else None
    else:
        said = example.answer if predicted == 0 else None
    return {
        "where": Path(rows.where(index)).name,
        "prompt": _clipped(unplaced(example.prompt)),
        "answer": _clipped(example.answer),
        "predicted": None if said is None else _clipped(said),
        "pictures": [_small(one) for one in example.images[:_PICTURES]],
    }


def _small(picture: Picture) -> str:
    """A picture as it goes into a page.

    Raises:
        UsageError: it cannot be read any more.
    """
    image = picture.read()
    image.thumbnail((_SIDE, _SIDE))
    written = io.BytesIO()
    image.save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


def _clipped(text: str) -> str:
    """A long text without its middle; what no file can hold is replaced."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= _BEGIN + _END else f"{text[:_BEGIN]} … {text[-_END:]}"
