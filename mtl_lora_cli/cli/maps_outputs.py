"""What `merge` and `export` do with runs of maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_lora_cli.cli.frame import emit, emit_json, say
from mtl_lora_cli.cli.outputs import require_pushable

if TYPE_CHECKING:
    from mtl_lora_cli.export.maps.check import MapDifference
    from mtl_lora_cli.export.maps.order import MapsOrder
    from mtl_lora_cli.runs.folder import RunFolder


def of_maps(run: RunFolder) -> bool:
    """Whether a run's tasks answer with maps."""
    from mtl_lora_cli.tasks.chosen import read_tasks
    from mtl_lora_cli.tasks.maps import MAPS

    return any(task.objective in MAPS for task in read_tasks(run))


def merge_maps_of(
    run: RunFolder,
    task: str,
    output: Path | None,
    *,
    limit: int,
    check: bool,
    push: str | None,
    as_json: bool,
) -> None:
    """One folder, of the task that is named or of all."""
    from mtl_lora_cli.export.hub import push as push_folder
    from mtl_lora_cli.export.maps.folder import merge_maps

    require_pushable(push, [run], check)
    order = _order(run, task, output or Path("merged", run.name, task), limit, check)
    found = merge_maps(order)
    if push is not None:
        say(f"pushed to {push_folder(order.folder, push)}")
    _emit(order, found, as_json)


def export_maps_of(
    run: RunFolder,
    kind: str,
    task: str,
    output: Path | None,
    *,
    limit: int,
    check: bool,
    push: str | None,
    as_json: bool,
) -> None:
    """One ONNX file, of the task that is named or of all.

    Raises:
        UsageError: another format.
    """
    from mtl_lora_cli.errors import UsageError
    from mtl_lora_cli.export.hub import push as push_folder

    if kind != "onnx":
        raise UsageError(
            f"--format {kind} is for language models; maps leave a run by --format onnx, or by merge"
        )
    from mtl_lora_cli.export.maps.onnx_file import export_maps

    require_pushable(push, [run], check)
    place = output or Path("exported", "onnx", run.name, task)
    order = _order(run, task, place, limit, check)
    found = export_maps(order)
    if push is not None:
        say(f"pushed to {push_folder(order.folder, push)}")
    _emit(order, found, as_json, by="onnxruntime")


def _order(run: RunFolder, task: str, folder: Path, limit: int, check: bool) -> MapsOrder:
    from mtl_lora_cli.evaluation.opened import Run
    from mtl_lora_cli.export.maps.order import MapsOrder
    from mtl_lora_cli.tasks.chosen import select_tasks

    opened = Run(run)
    run.require_adapter()
    opened.recipe  # noqa: B018 - its extensions come first
    chosen = select_tasks(opened.tasks, task)
    opened.base  # noqa: B018 - another one is refused before anything is done
    return MapsOrder(opened, chosen, folder, limit, check, say)


def _emit(
    order: MapsOrder,
    found: Mapping[str, MapDifference],
    as_json: bool,
    by: str = "transformers and torch alone",
) -> None:
    """What was written where, and how it compared."""
    from mtl_lora_cli.export.maps.check import in_words

    if as_json:
        tasks = {name: asdict(one) for name, one in found.items()}
        names = [task.name for task in order.tasks]
        emit_json(
            {"path": str(order.folder), "tasks": names, "checked": bool(found), "compared": tasks}
        )
    elif found:
        pictures = f"on {len(order.pictures)} held-out pictures"
        emit(f"{order.folder}: {pictures}, run by {by}: {in_words(found)}")
    else:
        emit(f"{order.folder}: not checked")
