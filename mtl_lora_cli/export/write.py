"""How everything that leaves a run is written: refused, or written beside its place, checked, and described."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from mtl_lora_cli.errors import CheckError, MtlLoraError, UsageError
from mtl_lora_cli.evaluation.evaluate import held_out
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.export.check import WrittenCheck
from mtl_lora_cli.export.comparison import Comparison
from mtl_lora_cli.export.formats import Format, blamed, find_format
from mtl_lora_cli.export.order import Options, Order, Say, WrittenFolder
from mtl_lora_cli.models.load import load_config
from mtl_lora_cli.runs.atomic import new_folder, write_text
from mtl_lora_cli.runs.paths import existing, require_writable
from mtl_lora_cli.tasks.task import Task

FAILED = "FAILED.md"


def write_tasks(
    kind: str,
    run: Run,
    targets: Sequence[tuple[Task, Path]],
    options: Options | None = None,
    say: Say = lambda text: None,
) -> list[WrittenFolder]:
    """Write tasks in a format, let another party read each again, compare, and only then put it in its place.

    Nothing is written before all of it could be.

    Args:
        kind: of the format, by name.
        run: whose tasks they are.
        targets: each task and the folder where it goes, which must not exist or be empty.
        options: how; None: the defaults.
        say: called with progress lines.

    Raises:
        UsageError: an output folder is not empty, the disk too small, a task has no held-out rows, what reads
            the format is not installed, or the format refuses.
        MtlLoraError: the disk refuses.
        CheckError: what was written differs; it lies aside.
    """
    options = options or Options()
    form = find_format(kind)
    if options.rank is not None and not form.reducible:
        raise UsageError("--rank is for adapters; a merged model has none")
    _require_sight(form, run)
    stays, scratch = 0, 0
    first = Order(run, *targets[0], options, say)  # what it asks of the files takes seconds

    def orders() -> Iterator[Order]:
        yield first
        for task, folder in targets[1:]:
            yield Order(run, task, folder, options, say)

    for order in orders():
        require_empty(order.folder)
        if options.checked:
            require_held_out(order.task, options.limit)
        with blamed(form):
            form.refuses(order)
            stays += form.size(order)
            scratch = max(scratch, form.scratch(order))
    if options.checked:
        form.require_reader()
    require_space(stays + scratch, targets[0][1])
    return [_written(form, order) for order in orders()]


def _require_sight(form: Format, run: Run) -> None:
    """Refuse a format that holds no model of pictures for a run with some.

    Raises:
        UsageError: it does not.
    """
    shows = [task.name for task in run.tasks if task.template.images]
    if (shows or run.adapter.whole) and not form.pictures:
        raise UsageError(
            f"export --format {form.name}: a model of type '{load_config(run.base).model_type}' that reads pictures "
            "cannot be written so; merge and export --format peft can"
        )


def _written(form: Format, order: Order) -> WrittenFolder:
    """One task, in its place."""
    folder = order.folder
    with blamed(form):
        needed = form.size(order) + form.scratch(order)
    require_empty(folder)
    require_space(needed, folder)
    try:
        with new_folder(folder) as temporary:
            if order.options.checked:
                comparison: Comparison | None = _compared(form, order, temporary)
            else:
                with blamed(form):
                    form.write(order, temporary)
                comparison = None
            with blamed(form):
                readme = form.card(order, temporary, comparison)
            (temporary / "README.md").write_text(readme, encoding="utf-8")
    except OSError as error:
        raise MtlLoraError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return WrittenFolder(order.task.name, folder, comparison, order.truncation)


def _compared(form: Format, order: Order, temporary: Path) -> Comparison:
    """Write, look at the files, and hold answers against the run's, which is asked meanwhile."""
    options = order.options
    with blamed(form):
        references = form.references(order)
        allowed = options.tolerance if options.tolerance is not None else form.tolerance(order.run)
    check = WrittenCheck(form.name, references, options.limit, allowed)
    with (
        check.beside(order.run, order.task, temporary) as compare,
        ThreadPoolExecutor(1) as looking,
    ):
        with blamed(form):
            form.write(order, temporary)
        order.say("loading it again and comparing")
        looked = looking.submit(form.fault, order, temporary)
        comparison = _unless(looked, compare, form)
    if isinstance(comparison, str):
        reason = f"{form.differs} on task '{order.task.name}': {comparison}"
        raise CheckError(set_aside(temporary, order.folder, reason))
    if not comparison.holds:
        reason = (
            f"{form.differs} on task '{order.task.name}': largest difference of log-probabilities "
            f"{comparison.largest:.3g}, equal answers {comparison.equal:.1%}"
            f"{comparison.told and f', {comparison.told}'}; they had to agree {comparison.asked}"
        )
        raise CheckError(set_aside(temporary, order.folder, reason))
    return comparison


def _unless(
    looked: Future[str | None], compare: Callable[[], Comparison], form: Format
) -> Comparison | str:
    """How answers compare; where the files have a fault, that one, which says more."""
    try:
        comparison = compare()
    except MtlLoraError:
        with blamed(form):
            if (fault := looked.result()) is not None:
                return fault
        raise
    with blamed(form):
        fault = looked.result()
    return comparison if fault is None else fault


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
    place = existing(folder)
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


def set_aside(written: Path, folder: Path, reason: str) -> str:
    """Move what failed where nobody takes it for good, `FOLDER.failed`, or the next free name, and say so."""
    number, aside = 1, folder.with_name(f"{folder.name}.failed")
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.failed-{number}")
    write_text(
        written / FAILED, f"# Do not use this\n\nThe check after writing failed: {reason}.\n"
    )
    written.replace(aside)
    return f"{reason}; it lies in {aside}"
