"""What a person sees while a run is learning."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_PLAIN_SECONDS = 5.0  # between two lines where there is no terminal


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class TrainingProgress:
    """A bar on a terminal, plain lines elsewhere; everything goes to stderr.

    Args:
        steps: optimiser steps of the whole run.
        done: steps done before this start.
        console: where to write; by default stderr.
    """

    def __init__(self, steps: int, done: int = 0, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._steps = steps
        self._done = done
        self._started = time.monotonic()
        self._last_line = 0.0
        self._smoothed: dict[str, float] = {}
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[note]}"),
                console=self._console,
                transient=False,
            )
            self._task = self._bar.add_task("", total=steps, completed=done, note="")
            self._bar.start()

    def update(self, event: Mapping[str, Any]) -> None:
        """Show one step's event as it stands in metrics.jsonl."""
        for task, loss in event["task_loss"].items():
            before = self._smoothed.get(task, loss)
            self._smoothed[task] = 0.8 * before + 0.2 * loss
        now = time.monotonic()
        done = event["step"]
        left = (now - self._started) / max(1, done - self._done) * (self._steps - done)
        losses = "  ".join(f"{task} {loss:.3f}" for task, loss in self._smoothed.items())
        parts = [f"loss {event['loss']:.3f}", f"{event['tokens_per_second']:,.0f} tokens/s"]
        if "floor_share" in event:
            parts[-1] += f" ({event['floor_share']:.0%} of the floor)"
        if "memory_gib" in event:
            parts.append(f"{event['memory_gib']:.1f} GiB")
        note = "  ".join([*parts, f"{duration(left)} left"])
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=f"{note}\n{losses}")
        elif now - self._last_line >= _PLAIN_SECONDS or done == self._steps:
            self._last_line = now
            self._console.print(f"step {done}/{self._steps}  {note}  |  {losses}", soft_wrap=True)

    def say(self, text: str) -> None:
        """One line between the updates."""
        self._console.print(text, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
