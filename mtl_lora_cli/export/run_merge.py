"""`merge`: tasks of a run as ordinary models; and how everything that leaves a run is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mtl_lora_cli.errors import CheckError, MtlLoraError, UsageError
from mtl_lora_cli.evaluation.evaluate import held_out
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.export.card import merged_card
from mtl_lora_cli.export.check import (
    Check,
    Comparison,
    Reader,
    merged_model,
    run_itself,
    run_on_original,
)
from mtl_lora_cli.export.merge import MergePlan, plan_merge, task_updates, write_merged
from mtl_lora_cli.export.quantised import measure_rounding, quantised
from mtl_lora_cli.runs.atomic import new_folder, write_text
from mtl_lora_cli.runs.paths import require_writable
from mtl_lora_cli.tasks.task import Task

BASES = ("original", "dequantized")
FAILED = "FAILED.md"


@dataclass(frozen=True)
class Written:
    """A written folder and how it compared; None where nothing was compared."""

    task: str
    folder: Path
    comparison: Comparison | None


def merge_tasks(
    run: Run,
    targets: Sequence[tuple[Task, Path]],
    *,
    base: str = "original",
    limit: int = 32,
    tolerance: float | None = None,
    checked: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> list[Written]:
    """Write merged models, load each again, compare, and only then put it in its place.

    Args:
        run: whose tasks they are.
        targets: each task and the folder where it goes, which must not exist or be empty.
        base: merge into the `original` weights, or into `dequantized` ones: those that a quantised
            run saw.
        limit, tolerance: see `Check`.
        checked: compare at all.
        say: called with progress lines.

    Raises:
        UsageError: an output folder is not empty, the disk too small, a task has no held-out rows,
            the base model's weights do not fit, the method is no LoRA for any task, or the run is
            not quantised and should be.
        CheckError: a written model differs; it lies aside.
    """
    kind = run.recipe.quantization
    if base == "dequantized" and kind == "none":
        raise UsageError(
            f"--base dequantized is for quantised runs; run '{run.folder.name}' has "
            "quantization: none, so the original weights are what it saw"
        )
    how = None if kind == "none" else quantised(run.base, kind, run.dtype)

    def plan(task: Task) -> MergePlan:
        return plan_merge(
            run.base, task_updates(run.adapter, task.id), how if base == "dequantized" else None
        )

    for task, folder in targets:
        require_empty(folder)
        if checked:
            require_held_out(task, limit)
    place = _existing(targets[0][1])
    require_space(len(targets) * plan(targets[0][0]).size(place), place)
    rounding = None
    if how is not None:
        say(f"measuring what {kind} rounds")
        rounding = measure_rounding(run.base, how)
    check = Check(merged_model, _models(kind, base), limit, tolerance) if checked else None
    found = []
    for task, folder in targets:
        planned = plan(task)
        found.append(
            write_checked(
                run,
                task,
                folder,
                what="the merged model differs from the adapted one",
                size=planned.size(place),
                write=partial(write_merged, planned, say=say),
                check=check,
                readme=partial(merged_card, run, task, base=base, rounding=rounding),
                say=say,
            )
        )
    return found


def _models(kind: str, base: str) -> dict[str, Reader]:
    """What the merged model is compared with; what it must equal stands first."""
    if kind == "none":
        return {"the run's adapter": run_itself}
    both = {
        "the run's adapter on the original weights": run_on_original,
        f"the run's adapter on its {kind} weights": run_itself,
    }
    return dict(both.items() if base == "original" else reversed(both.items()))


def write_checked(
    run: Run,
    task: Task,
    folder: Path,
    *,
    what: str,
    size: int,
    write: Callable[[Path], None],
    check: Check | None,
    readme: Callable[[Path, Comparison | None], str],
    say: Callable[[str], None] = lambda text: None,
) -> Written:
    """Write beside the folder, check what was written, and only then put it in its place.

    Args:
        run: what is written belongs to it.
        task: and is for this task.
        folder: where to; must not exist or be empty.
        what: an error's beginning, such as "the merged model differs from the adapted one".
        size: bytes that `write` needs.
        write: fills a folder.
        check: what it has to stand; None writes without.
        readme: the text of README.md, from the folder and the comparison.
        say: called with progress lines.

    Raises:
        UsageError: the folder holds something, or the disk is too small.
        MtlLoraError: the disk refuses.
        CheckError: `what`, and by how much; the output lies aside, with the reason in FAILED.md.
    """
    require_empty(folder)
    require_space(size, folder)
    try:
        with new_folder(folder) as temporary:
            write(temporary)
            comparison = None
            if check is not None:
                say("loading it again and comparing")
                comparison = check.run(run, task, temporary)
                if not comparison.holds:
                    raise _set_aside(temporary, folder, f"{what} on task '{task.name}'", comparison)
            write_text(temporary / "README.md", readme(temporary, comparison))
    except OSError as error:
        raise MtlLoraError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return Written(task.name, folder, comparison)


def require_empty(folder: Path) -> None:
    """Refuse an output folder that holds something, or cannot be written.

    Raises:
        UsageError: it exists and is not an empty folder, or nothing can be written there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"output folder {folder} exists and is not empty; choose another with --output"
        )
    require_writable(folder, f"output folder {folder}")


def require_space(size: int, folder: Path) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        UsageError: with the space needed and the space there is.
    """
    place = _existing(folder)
    free = shutil.disk_usage(place).free
    if free < size:
        raise UsageError(
            f"{place}: {size / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free"
        )


def require_held_out(task: Task, limit: int) -> None:
    """Refuse to write what cannot be compared.

    Raises:
        UsageError: the task has no held-out rows, or they cannot be read.
    """
    try:
        held_out(task, Setting(limit=limit))
    except UsageError as error:
        raise UsageError(f"{error}; --no-check writes without comparing") from None


def _existing(folder: Path) -> Path:
    """The folder itself or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _set_aside(written: Path, folder: Path, what: str, comparison: Comparison) -> CheckError:
    """Move what failed where nobody takes it for good: `FOLDER.failed`, or the next free name."""
    reason = (
        f"{what}: largest difference of log-probabilities {comparison.largest:.3g}, "
        f"equal answers {comparison.equal:.1%}; they had to agree {comparison.asked}"
    )
    number, aside = 1, folder.with_name(f"{folder.name}.failed")
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.failed-{number}")
    write_text(
        written / FAILED, f"# Do not use this\n\nThe check after writing failed: {reason}.\n"
    )
    written.replace(aside)
    return CheckError(f"{reason}; it lies in {aside}")
