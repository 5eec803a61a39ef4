"""What a person sees while a run is learning: one screen on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mtl_lora_cli.visible import visible

_PLAIN_SECONDS = 5.0  # between two lines where there is no terminal
_LIVE_SECONDS = 0.5  # between two pictures where there is one
_NARROWEST = 60  # columns that the screen needs
_TOLD = 20  # tasks in a plain line
_FEW = 10  # below, speed is told with a digit behind the point
_LINES = 20  # that the screen takes at most
_COLUMNS = {"task": 19, "loss": 22, "validation": 10, "": 22}  # with two between: 79
_NAME = _COLUMNS["task"]
_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-=+*%#"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Trend:
    """A series as it grew, in a fixed number of means over equal stretches.

    Args:
        most: means at most; where there are more, neighbours are put together.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._means: list[float] = []
        self._span = 1  # values behind each mean
        self._open: list[float] = []
        self.smooth: float | None = None  # s ← 0.8 s + 0.2 v

    def add(self, value: float) -> None:
        """The next value."""
        self.smooth = value if self.smooth is None else 0.8 * self.smooth + 0.2 * value
        self._open.append(value)
        if len(self._open) < self._span:
            return
        self._means.append(sum(self._open) / self._span)
        self._open = []
        if len(self._means) == self._most:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(one + two) / 2 for one, two in pairs]
            self._span *= 2

    def drawn(self, levels: str) -> str:
        """A character a mean: the lowest is the first of `levels`, the highest the last."""
        if not self._means:
            return ""
        low, high = min(self._means), max(self._means)
        steps = (len(levels) - 1) / (high - low) if high > low else 0.0
        return "".join(levels[round((value - low) * steps)] for value in self._means)


class TrainingProgress:
    """A run's bar, losses, speed and what comes next; everything goes to stderr.

    Args:
        steps: optimiser steps of the whole run.
        done: steps done before this start.
        console: where to write; by default stderr.
        tasks: names in the order in which they are shown.
        every: what comes every so many steps, and after the last one: `validation` → 100.
        amount: what speed is told in.
    """

    def __init__(
        self,
        steps: int,
        done: int = 0,
        console: Console | None = None,
        *,
        tasks: Sequence[str] = (),
        every: Mapping[str, int | None] | None = None,
        amount: str = "tokens",
    ) -> None:
        self._amount = amount
        # Colours can be asked for without a terminal, a screen that is drawn again cannot.
        piped = None if sys.stderr.isatty() else False
        self._console = console or Console(stderr=True, highlight=False, force_terminal=piped)
        self._steps = steps
        self._done = self._first = done
        self._every = dict(every or {})
        self._started = time.monotonic()
        self._last_shown = 0.0
        self._loss = Trend(32)
        self._tasks = {name: Trend(16) for name in tasks}
        self._event: Mapping[str, Any] = {}
        self._seen: Mapping[str, Any] = {}
        self._best = ""
        self._ended = False
        self._live: Live | None = None
        able = self._console.is_terminal and not self._console.is_dumb_terminal
        if able and not self._console.quiet and self._console.width >= _NARROWEST:
            self._live = Live(self._screen(), console=self._console, auto_refresh=False)
            self._live.start(refresh=True)

    def update(self, event: Mapping[str, Any]) -> None:
        """Show one step's event as it stands in metrics.jsonl."""
        self._event, self._done = event, event["step"]
        self._loss.add(event["loss"])
        for task, loss in event["task_loss"].items():
            self._tasks.setdefault(task, Trend(16)).add(loss)
        now = time.monotonic()
        pause = _PLAIN_SECONDS if self._live is None else _LIVE_SECONDS
        if now - self._last_shown < pause and self._done < self._steps:
            return
        self._last_shown = now
        if self._live is not None:
            self._live.update(self._screen(), refresh=True)
        else:
            self._console.print(visible(self._plain()), soft_wrap=True, markup=False)

    def look(self, event: Mapping[str, Any], line: str | None = None) -> None:
        """Show what an observer found.

        Args:
            event: as it stands in metrics.jsonl.
            line: the same for a person.
        """
        if event["event"] == "validation":
            self._seen = event
        elif event["event"] == "best":
            self._best = f"best: step {event['step']}, {event['value']:.3f}"
        if line is not None:
            self.say(line)

    def say(self, text: str) -> None:
        """One line between the updates."""
        if self._live is not None and self._live.is_started:
            self._live.update(self._screen())
        self._console.print(visible(text), soft_wrap=True, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was, with the last picture on it."""
        self._ended = True
        if self._live is not None:
            self._live.update(self._screen())
            self._live.stop()

    def _time(self) -> str:
        """The time until the end at the pace so far; at the end, the time that it took."""
        passed, done = time.monotonic() - self._started, self._done - self._first
        if self._ended:
            return f"took {duration(passed)}"
        left = passed / done * (self._steps - self._done) if done else None
        return "" if left is None else f"{duration(left)} left"

    def _figures(self) -> list[str]:
        """The last step's speed and memory."""
        event = self._event
        if not event:
            return []
        share = f" ({event['floor_share']:.0%} of the floor)" if "floor_share" in event else ""
        speed = event["tokens_per_second"]
        digits = 0 if speed >= _FEW else 1
        found = [f"{speed:,.{digits}f} {self._amount}/s{share}"]
        if "memory_gib" in event:
            found.append(f"{event['memory_gib']:.1f} GiB")
        return found

    def _plain(self) -> str:
        parts = [f"loss {self._event['loss']:.3f}", *self._figures(), self._time()]
        losses = [
            f"{task} {t.smooth:.3f}" for task, t in self._tasks.items() if t.smooth is not None
        ]
        if len(losses) > _TOLD:
            losses[_TOLD:] = [f"{len(losses) - _TOLD} more tasks"]
        return f"step {self._done}/{self._steps}  {'  '.join(parts)}  |  {'  '.join(losses)}"

    def _screen(self) -> RenderableType:
        """All of it, in no more lines than the terminal has, and none wider than it is."""
        lines = [*self._head()]
        room = min(_LINES, self._console.height - 1) - len(lines) - 2  # their heading, the average
        return Group(*lines, *self._table(max(1, room)))

    def _head(self) -> Iterator[RenderableType]:
        row = Table.grid(padding=(0, 2))
        row.add_row(
            Text(f"step {self._done}/{self._steps}"),
            ProgressBar(total=self._steps, completed=self._done, width=30),
            Text(self._time()),
        )
        yield row
        if self._loss.smooth is not None:
            yield self._line(
                f"loss {self._loss.smooth:.3f} {self._loss.drawn(self._levels)}",
                f"learning rate {self._event['learning_rate']:.2e}",
            )
            yield self._line(*self._figures())
        coming = [
            f"{what} in {min(steps - self._done % steps, self._steps - self._done)} steps"
            for what, steps in self._every.items()
            if steps
        ]
        if self._ended:
            coming = []
        if coming or self._best:
            yield self._line(", ".join(coming), self._best)

    def _table(self, room: int) -> Iterator[RenderableType]:
        """A line a task, as many as there is room for."""
        tasks = list(self._tasks)
        if len(tasks) > room:
            tasks = tasks[: room - 1]
        seen, shown = self._seen, Table.grid(padding=(0, 2))
        headings = list(_COLUMNS)[: 4 if seen else 2]
        for heading in headings:
            shown.add_column(no_wrap=True, max_width=_COLUMNS[heading], overflow="crop")
        shown.add_row(*(Text(heading, style="bold") for heading in headings))
        for name in tasks:
            trend = self._tasks[name]
            loss = (
                "-" if trend.smooth is None else f"{trend.smooth:6.3f} {trend.drawn(self._levels)}"
            )
            shown.add_row(*map(Text, (self._clipped(name), loss, *self._validated(name))))
        if len(self._tasks) > 1 and seen:
            shown.add_row(*map(Text, ("macro average", "", *self._averages())))
        yield shown
        if len(tasks) < len(self._tasks):
            yield self._line(f"+ {len(self._tasks) - len(tasks)} more")

    def _validated(self, task: str) -> Iterator[str]:
        """A task's loss and metric at the last look, where there was one."""
        if self._seen:
            yield _number(self._seen["loss"].get(task)) if task in self._seen["loss"] else "-"
            name = self._seen.get("metric_name", {}).get(task)
            yield "" if name is None else f"{name} {_number(self._seen['metric'][task])}"

    def _averages(self) -> Iterator[str]:
        macro = self._seen["macro"]
        yield _number(macro["loss"])
        yield f"metric {_number(macro['metric'])}" if self._seen.get("metric_name") else ""

    def _line(self, *parts: str) -> Text:
        return Text("  ".join(filter(None, parts)), no_wrap=True, overflow="crop")

    @property
    def _levels(self) -> str:
        return _ASCII if self._console.options.ascii_only else _BLOCKS

    def _clipped(self, name: str) -> str:
        if len(name) <= _NAME:
            return name
        return name[: _NAME - 1] + ("~" if self._console.options.ascii_only else "…")


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
