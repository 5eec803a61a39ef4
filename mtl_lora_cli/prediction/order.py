"""A folder of rows and a folder for their answers: what is checked before, and what is done in which order."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.router import load_router
from mtl_lora_cli.prediction.desks import How
from mtl_lora_cli.prediction.in_hand import Job
from mtl_lora_cli.prediction.inputs import Part, find_files, plan
from mtl_lora_cli.prediction.manifest import (
    Begun,
    Done,
    Output,
    require_same,
    require_unchanged,
)
from mtl_lora_cli.prediction.reading import Reading, changed
from mtl_lora_cli.runs.atomic import file_checksum, write_text
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.runs.lock import only_writer
from mtl_lora_cli.runs.paths import require_replaceable, require_writable
from mtl_lora_cli.tasks.chosen import by_router, require_task, several_tasks

PART_ROWS = 16384
COLUMN = "prediction"


@dataclass(frozen=True)
class Order:
    """What is to be answered.

    Attributes:
        input: a folder of rows, or one file.
        output: the folder of the answers.
        how: what is asked.
        names: other names of fields of the rows, as templates know them.
        part_rows: rows of a part at most.
        column: the field that answers stand in.
        errors: the file that bad rows go to; None: the first one ends it.
    """

    input: Path
    output: Path
    how: How
    names: Mapping[str, str]
    part_rows: int = PART_ROWS
    column: str = COLUMN
    errors: Path | None = None


@dataclass(frozen=True)
class Totals:
    """How far an order is.

    Attributes:
        rows, parts: that there are.
        done_rows, done_parts: that are answered, bad rows included.
        bad: rows that were passed over.
        truncated: rows that were longer than the model reads.
    """

    rows: int
    parts: int
    done_rows: int
    done_parts: int
    bad: int
    truncated: int


def require_places(order: Order) -> None:
    """Refuse places that cannot be read or written, before anything is loaded.

    Raises:
        UsageError: one lies in the other, or cannot be written.
    """
    inside, outside = order.output.resolve(), order.input.resolve()
    if inside.is_relative_to(outside) or (order.input.is_dir() and outside.is_relative_to(inside)):
        raise UsageError(f"--output {order.output}: one of it and --input lies in the other")
    require_writable(order.output, f"--output {order.output}")
    if order.errors is not None:
        if order.errors.is_dir():
            raise UsageError(f"--errors {order.errors}: is a folder, expected a file")
        listed = order.errors.resolve()
        for option, place, own in (
            ("--input", order.input, outside),
            ("--output", order.output, inside),
        ):
            if listed.is_relative_to(own):  # it would be read as rows, or take the place of some
                raise UsageError(
                    f"--errors {order.errors}: lies in {option} {place}, expected a file elsewhere"
                )
        require_writable(order.errors.parent, f"--errors {order.errors}")
        marks = (b'{"file": ', b'"row": ', b'"error": ')  # as `Fault.to_json`
        require_replaceable(order.errors, f"--errors {order.errors}", "such errors", marks)


def require_tasks(opened: Run, how: How) -> None:
    """Refuse tasks that the run does not have, before its model is loaded.

    Raises:
        UsageError: see `Predictor.predict`; or the run has no router.
    """
    names = [task.name for task in opened.tasks]
    if by_router(names, how.task, how.task_column):
        load_router(opened.folder, opened.checkpoint)
    elif not several_tasks(names, how.task, how.task_column):
        require_task(names, how.task if isinstance(how.task, str) else None, how.task_column)


class Work:
    """An order that was begun: which of its parts are done, and which are not. See `opened_work`.

    Args:
        order: what is to be answered.
        job: for lanes.
        output: the folder.
        begun: what it is of.
        done: parts that are done.
    """

    def __init__(
        self, order: Order, job: Job, output: Output, begun: Begun, done: dict[str, Done]
    ) -> None:
        self.order, self.job, self._output, self._begun = order, job, output, begun
        self._done = done
        self.before = len(done)

    @property
    def missing(self) -> list[Part]:
        """Parts that are not done, in order."""
        return [part for part in self._begun.parts if part.name not in self._done]

    @property
    def totals(self) -> Totals:
        """How far it is."""
        parts = self._begun.parts
        known = [self._done[part.name] for part in parts if part.name in self._done]
        # Of JSON lines not done yet, empty ones are counted, too: nobody has read them.
        done_rows = sum(one.rows + len(one.bad) for one in known)
        return Totals(
            rows=done_rows + sum(part.rows for part in self.missing),
            parts=len(parts),
            done_rows=done_rows,
            done_parts=len(known),
            bad=sum(len(one.bad) for one in known),
            truncated=sum(one.truncated for one in known),
        )

    def follow(
        self, answers: Iterable[Done], told: Callable[[Done], None] = lambda done: None
    ) -> None:
        """Remember parts as they are answered."""
        with ThreadPoolExecutor(1) as notes:  # a disk may be slow, and a model wants its thread
            noted: deque[Future[None]] = deque()
            for done in answers:
                noted.append(notes.submit(self._output.add, done))
                self._done[done.part] = done
                told(done)
                while noted and noted[0].done():
                    noted.popleft().result()
            for one in noted:
                one.result()

    def look_again(self) -> None:
        """Know what the folder knows, after an interruption at any moment."""
        self._done = self._output.done()

    def finish(self) -> None:
        """All parts are done.

        Raises:
            UsageError: a file of the input was written to meanwhile.
        """
        for file in self._begun.files:
            state = (self.job.reading.root / file.name).stat()
            if (state.st_size, state.st_mtime_ns) != (file.size, file.changed):
                raise changed(self.job.reading.root / file.name)
        self._output.begin(replace(self._begun, complete=True))

    def write_errors(self) -> None:
        """Write the rows that were passed over as JSON lines, where that was asked for."""
        if self.order.errors is None:
            return
        order = [self._done[part.name] for part in self._begun.parts if part.name in self._done]
        lines = (json.dumps(bad, ensure_ascii=False) for done in order for bad in done.bad)
        self.order.errors.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.order.errors, "".join(f"{line}\n" for line in lines))


@contextmanager
def opened_work(opened: Run, order: Order, *, force: bool = False) -> Iterator[Work]:
    """Begin an order, or go on with it; nobody else writes into its output meanwhile.

    Args:
        opened: the run; its model is not loaded.
        order: what is to be answered.
        force: see `open_run`.

    Raises:
        UsageError: a file cannot be read; the output is of another run, of other rows or options; or another
            process writes there.
    """
    order.output.mkdir(parents=True, exist_ok=True)
    try:
        with only_writer(RunFolder(order.output), f"--output {order.output} is being written"):
            try:
                yield _begun(opened, order, force)
            finally:
                Output(order.output).sweep()  # of lanes that were ended
    finally:
        with suppress(OSError):  # where nothing was begun
            order.output.rmdir()


def _begun(opened: Run, order: Order, force: bool) -> Work:
    root, names = find_files(order.input)
    output = Output(order.output)
    before = output.begun()
    begun = Begun(
        run=_print_of(opened),
        input=str(order.input),
        options=_options(order, opened.of_maps),
        files=[],
    )
    if before is not None and output.is_unanswered():
        before = None  # what was wrong with the call may be mended
    if before is not None:
        require_same(before, begun, order.output)
    output.sweep()
    known = {} if before is None else {file.name: file for file in before.files}
    begun = replace(begun, files=plan(root, names, order.part_rows, known))
    if not begun.parts:
        raise UsageError(f"{order.input}: has no rows, expected at least one")
    done = output.done()
    require_unchanged(begun, done, order.output)
    output.begin(begun)
    reading = Reading(root, order.names, order.column, order.errors is not None)
    job = Job(opened.folder.path.resolve(), force, order.how, reading, order.output)
    return Work(order, job, output, begun, done)


def _print_of(opened: Run) -> dict[str, Any]:
    return {
        "name": opened.folder.name,
        "checkpoint": opened.checkpoint,
        "tasks": file_checksum(opened.folder.tasks),
        "base_model": opened.base.identity(),
    }


def _options(order: Order, of_maps: bool) -> dict[str, Any]:
    """By the names of the command line."""
    how = order.how
    task = ",".join(how.task) if isinstance(how.task, list) else how.task
    return {
        "task": task,
        "task_column": how.task_column,
        "temperature": how.temperature,
        "seed": how.seed,
        "answers": how.answers,
        "part_rows": order.part_rows,
        "answer_column": order.column,
        **({"format": how.form} if of_maps else {}),
    }
