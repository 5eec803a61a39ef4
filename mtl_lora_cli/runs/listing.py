"""What the runs of a folder are and how far they came, read from their files alone."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.runs.folder import RunFolder, read_json, run_names
from mtl_lora_cli.runs.lock import writer_of

FINISHED = "finished"  # its adapter is there
RUNNING = "running"  # a process holds its lock
PERHAPS = "running?"  # none does, but it was written to just now: maybe where locks do not reach
STOPPED = "stopped"  # nothing behind its newest checkpoint would be lost
UNFINISHED = "unfinished"  # some steps behind its newest checkpoint would be
DAMAGED = "damaged"

_RECENT = 60.0  # seconds; more where ten steps take longer
_TAIL = 2**16


@dataclass(frozen=True)
class Score:
    """The newest result of a run's adapter on one task."""

    metric: str
    value: float
    examples: int


@dataclass(frozen=True)
class Summary:
    """One run.

    Attributes:
        status: one of this module's words.
        reason: what is damaged, in one line; otherwise None.
        step: of the last line in metrics.jsonl; 0 where no step was done.
        steps: of the whole run; None where tasks.json does not say.
        checkpoints: steps of the complete ones, in order.
        tasks: their names.
        scores: task → the first metric of its newest result, where there is one.
        best: `step`, `of` and `value` of the best look that `training.validation.best` asks for, as
            the newest checkpoint has it.
        bytes: of all files.
        changed: seconds since the epoch, when it was written to last.
    """

    name: str
    path: Path
    status: str
    reason: str | None
    step: int
    steps: int | None
    checkpoints: list[int]
    tasks: list[str]
    scores: dict[str, Score] = field(hash=False)
    best: dict[str, Any] | None = field(hash=False)
    bytes: int
    changed: float

    @property
    def mean(self) -> float | None:
        """Of the tasks' scores; None without any, and where more is better for some and less for others."""
        if len({score.metric.endswith("↓") for score in self.scores.values()}) > 1:
            return None
        values = [score.value for score in self.scores.values()]
        return sum(values) / len(values) if values else None


def newest_first(directory: Path) -> list[RunFolder]:
    """The runs in a folder, the one that began last first."""
    runs = [RunFolder(directory / name) for name in run_names(directory)]
    return sorted(runs, key=lambda run: (-run.recipe.stat().st_mtime, run.name))


def task_names(run: RunFolder) -> list[str]:
    """The tasks of a run, in the order of their ids.

    Raises:
        MtlLoraError: tasks.json is missing or damaged.
    """
    return _plan(run)[0]


def _plan(run: RunFolder) -> tuple[list[str], int | None]:
    """What tasks.json says: names, and how many steps the run takes.

    Raises:
        MtlLoraError: it is missing or damaged.
    """
    content = read_json(run.tasks)
    try:
        steps = content.get("mixture", {}).get("steps")
        names = [str(task["name"]) for task in content["tasks"]]
        return names, None if steps is None else int(steps)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MtlLoraError(f"{run.tasks}: damaged: {type(error).__name__} {error}") from None


def summary(run: RunFolder) -> Summary:
    """How a run stands; damage in its files is told, not raised."""
    reason, steps, best = None, None, None
    tasks: list[str] = []
    scores: dict[str, Score] = {}
    kept = checkpoint_steps(run)
    try:
        tasks, steps = _plan(run)
        best = _best_look(run, kept)
        scores = newest_scores(run)
    except (MtlLoraError, OSError) as error:
        reason = " ".join(str(error).split())
    last = last_step(run.metrics)
    files = [file for _, file in files_of(run.path)]
    return Summary(
        name=run.name,
        path=run.path,
        status=DAMAGED if reason else _status(run, last, kept),
        reason=reason,
        step=int(last.get("step", 0)),
        steps=steps,
        checkpoints=kept,
        tasks=tasks,
        scores=scores,
        best=best,
        bytes=sum(file.st_size for file in files),
        changed=max((file.st_mtime for file in files), default=0.0),
    )


def _status(run: RunFolder, last: dict[str, Any], kept: Sequence[int]) -> str:
    if run.adapter.is_dir():
        return FINISHED
    activity = activity_of(run, last)
    if activity is not None:
        return activity
    return STOPPED if kept and kept[-1] == last.get("step") else UNFINISHED


def activity_of(run: RunFolder, last: dict[str, Any] | None = None) -> str | None:
    """RUNNING or PERHAPS where a process seems to be at a run, else None."""
    if writer_of(run) is not None:
        return RUNNING
    if run.adapter.is_dir():
        return None
    last = last_step(run.metrics) if last is None else last
    patience = max(_RECENT, 10 * float(last.get("seconds", 0.0)))
    signs = [path.stat().st_mtime for path in (run.recipe, run.metrics) if path.exists()]
    return PERHAPS if time.time() - max(signs, default=0.0) < patience else None


def last_step(metrics: Path) -> dict[str, Any]:
    """The last whole line of a step in metrics.jsonl, read from its end; empty where there is none."""
    if not metrics.is_file():
        return {}
    size, take = metrics.stat().st_size, _TAIL
    while True:
        with metrics.open("rb") as file:
            file.seek(max(0, size - take))
            lines = file.read().split(b"\n")
        for line in reversed(lines):
            try:
                event = json.loads(line)
            except ValueError:  # torn, or cut by where we began
                continue
            if isinstance(event, dict) and event.get("event") == "step":
                return event
        if take >= size:
            return {}
        take *= 8


def checkpoint_steps(run: RunFolder) -> list[int]:
    """The steps of the complete checkpoints, in order."""
    found = run.checkpoints.glob("step-*/COMPLETE")
    steps = [re.fullmatch(r"step-(\d+)", file.parent.name) for file in found]
    return sorted(int(step[1]) for step in steps if step)


def _best_look(run: RunFolder, kept: Sequence[int]) -> dict[str, Any] | None:
    """What the newest checkpoint says of the best look before it.

    Raises:
        MtlLoraError: it is damaged.
    """
    if not kept:
        return None
    state = run.checkpoints / f"step-{kept[-1]:06d}" / "state.json"
    best = read_json(state).get("best")
    try:
        return None if best is None else {key: best[key] for key in ("step", "of", "value")}
    except (KeyError, TypeError) as error:
        raise MtlLoraError(f"{state}: damaged: {type(error).__name__} {error}") from None


def newest_scores(run: RunFolder) -> dict[str, Score]:
    """Task → the first metric of the newest result of the run's adapter.

    Raises:
        MtlLoraError: a result is damaged.
    """
    index = run.evaluations / "index.json"
    if not index.is_file():
        return {}
    found = {}
    try:
        content = read_json(index)
        known = content.get("digests") or {}
        for identity in content["evaluations"]:
            one = known.get(identity) or digest_of(read_json(run.evaluations / f"{identity}.json"))
            if one["model"] == "adapter" and one["value"] is not None:
                score = Score(str(one["metric"]), float(one["value"]), int(one["examples"]))
                found[str(one["task"])] = score
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__} {error}"
        raise MtlLoraError(f"{run.evaluations}: a damaged result: {what}") from None
    return found


def digest_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a list of runs shows of a result: `index.json` keeps it, since results hold every row."""
    metric, measured = next(iter(result["metrics"].items()), ("", {"value": None}))
    title = (result.get("titles") or {}).get(metric, metric)
    own = {name: result[name] for name in ("task", "model", "examples")}
    return {**own, "metric": title, "value": measured["value"]}


def read_digests(run: RunFolder) -> dict[str, Any]:
    """Id → `digest_of` that result; early versions kept none.

    Raises:
        MtlLoraError: the index is damaged.
    """
    index = run.evaluations / "index.json"
    return dict(read_json(index).get("digests") or {}) if index.is_file() else {}


def files_of(path: Path | str) -> Iterator[tuple[str, os.stat_result]]:
    """Every file below a folder, with what is known of it; no link is followed."""
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from files_of(entry.path)
                    continue
                try:
                    yield entry.path, entry.stat(follow_symlinks=False)
                except OSError:  # removed meanwhile
                    continue
    except OSError:
        return
