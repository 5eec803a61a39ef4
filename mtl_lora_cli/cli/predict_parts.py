"""`mtl-lora predict --input FOLDER --output FOLDER`: rows in parts, gone on with where it ended."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl_lora_cli.cli.frame import as_json, emit, say, status

if TYPE_CHECKING:
    from mtl_lora_cli.prediction.manifest import Done
    from mtl_lora_cli.prediction.order import Totals, Work
    from mtl_lora_cli.runs.folder import RunFolder

_SECONDS = {True: 0.5, False: 10.0}  # between two lines, on a terminal and elsewhere


def predict_parts(
    folder: RunFolder,
    rows: Path,
    output: Path,
    how: Mapping[str, Any],
    names: Mapping[str, str],
    *,
    force: bool,
    errors: Path | None,
    part_rows: int | None,
    answer_column: str | None,
    lanes: int | None,
    ray: str | None,
    actors: int | None,
) -> None:
    """Answer what is not answered yet, and print what there is then.

    Args:
        folder: of the run.
        rows, output: folders of the rows and their answers.
        how: see `desks.How`.
        names: other names of fields, as templates know them.
        force: see `open_run`.
        errors, part_rows, answer_column, lanes, ray, actors: options of the command.

    Raises:
        UsageError: see `order.opened_work`; or a row cannot be answered.
        KeyboardInterrupt: Ctrl-C, with what is done by then, and how to go on.
    """
    from mtl_lora_cli.errors import UsageError

    if ray is None and actors is not None:
        raise UsageError("--actors goes with --ray")
    if ray is not None and lanes is not None:
        raise UsageError("--lanes goes without --ray: --actors says how many work at once")
    # Sums over another number of threads have other last digits: a part that is answered again must be the same.
    os.environ.setdefault("MTL_LORA_THREADS", "fixed")
    status("loading libraries")
    from mtl_lora_cli.evaluation.opened import open_run
    from mtl_lora_cli.prediction.desks import How
    from mtl_lora_cli.prediction.order import (
        COLUMN,
        PART_ROWS,
        Order,
        opened_work,
        require_places,
        require_tasks,
    )

    order = Order(
        rows,
        output,
        How(**how),
        names,
        part_rows or PART_ROWS,
        answer_column or COLUMN,
        errors,
    )
    require_places(order)
    if ray is not None:
        from mtl_lora_cli.prediction.ray_actors import require_ray

        require_ray()
    opened = open_run(folder, force=force)
    require_tasks(opened, order.how)
    status("looking at the rows")
    with opened_work(opened, order, force=force) as work:
        progress = Progress(work.totals)
        if work.before:
            say(f"going on: {_so_far(work.totals)}")
        began = time.monotonic()
        try:
            if work.missing:
                _answer(opened, work, progress, lanes=lanes, ray=ray, actors=actors)
            work.finish()
        except KeyboardInterrupt:
            progress.end()
            work.look_again()
            work.write_errors()
            raise KeyboardInterrupt(
                f"interrupted: {_so_far(work.totals)}; the same command goes on from there"
            ) from None
        except Exception:
            progress.end()
            if work.totals.done_parts:
                say(f"{_so_far(work.totals)}; the same command goes on from there")
            raise
        progress.end()
        work.write_errors()
        _tell(work, time.monotonic() - began)


def _answer(
    opened: Any,
    work: Work,
    progress: Progress,
    *,
    lanes: int | None,
    ray: str | None,
    actors: int | None,
) -> None:
    def done(one: Done) -> None:
        progress.part(len(one.bad))

    if ray is not None:
        from mtl_lora_cli.prediction.ray_actors import answers_of

        status(f"starting actors on Ray, {ray}")

        def done_there(one: Done) -> None:
            done(one)
            progress.rows(one.rows)

        work.follow(answers_of(work.job, work.missing, address=ray, actors=actors), done_there)
        return
    from mtl_lora_cli.prediction.course import Course

    status(f"loading run {opened.folder.name}")
    course = Course(opened, work.job, lanes)
    try:
        work.follow(course.run(work.missing, progress.rows), done)
    finally:
        work.follow(course.close(), done)


def _so_far(totals: Totals) -> str:
    return (
        f"{totals.done_parts:,} of {totals.parts:,} parts are answered, "
        f"{totals.done_rows:,} of {totals.rows:,} rows"
    )


def _tell(work: Work, seconds: float) -> None:
    totals = work.totals
    if totals.truncated:
        say(
            f"note: {totals.truncated:,} of {totals.rows:,} rows were longer than the model's positions and "
            "lost their beginning"
        )
    if totals.bad:
        listed = work.order.errors or "--errors FILE lists them"
        say(f"note: {totals.bad:,} of {totals.rows:,} rows could not be answered: {listed}")
    emit(
        as_json(
            {
                "output": str(work.order.output),
                "parts": totals.parts,
                "rows": totals.done_rows,
                "bad_rows": totals.bad,
                "answered_now": totals.done_parts - work.before,
                "seconds": round(seconds, 1),
            }
        )
    )


class Progress:
    """Rows, rows a second and the time left: one line that is written again on a terminal, lines elsewhere.

    Args:
        totals: how far it is at the beginning.
        clock: seconds.
    """

    def __init__(self, totals: Totals, clock: Callable[[], float] = time.monotonic) -> None:
        self._rows, self._parts = totals.rows, totals.parts
        self._done, self._done_parts = totals.done_rows, totals.done_parts
        self._first = totals.done_rows
        self._clock = clock
        self._terminal = sys.stderr.isatty()
        self._shown = self._began = clock()
        self._started: float | None = (
            None  # when the first rows were answered: the model is loaded then
        )
        self._open = False

    def rows(self, count: int) -> None:
        """So many rows more are answered."""
        now = self._clock()
        self._done += count
        if self._started is None:
            self._started, self._first = now, self._done
        if now - self._shown >= _SECONDS[self._terminal]:
            self._shown = now
            self._show(self.line(now))

    def part(self, bad: int) -> None:
        """A part more is done; so many of its rows were passed over."""
        self._done_parts += 1
        self._done += bad

    def line(self, now: float) -> str:
        """`12,288 of 100,000 rows (12 %), 0 of 7 parts, 812 rows/s, 1 min 48 s left`."""
        from mtl_lora_cli.training.progress import duration

        parts = [
            f"{self._done:,} of {self._rows:,} rows ({self._done / self._rows:.0%})",
            f"{self._done_parts:,} of {self._parts:,} parts",
        ]
        passed = now - (now if self._started is None else self._started)
        if passed > 0 and self._done > self._first:
            rate = (self._done - self._first) / passed
            parts += [
                f"{rate:,.0f} rows/s",
                f"{duration((self._rows - self._done) / rate)} left",
            ]
        return ", ".join(parts)

    def _show(self, line: str) -> None:
        if self._terminal:
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()
            self._open = True
        else:
            say(line)

    def end(self) -> None:
        """Leave the terminal as it was."""
        if self._open:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._open = False
