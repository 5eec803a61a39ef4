"""What is said of a run while it learns: metrics.jsonl, the trackers, and the person who watches."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.drawn import Drawn
from mtl_lora_cli.training.progress import TrainingProgress


class Journal:
    """Writes down every event, and shows it.

    Args:
        run: whose metrics.jsonl is written.
        progress: what the person sees.
        tell: is told of every event that is written down.
        writes: whether this process writes; one of a run does.
    """

    def __init__(
        self,
        run: RunFolder,
        progress: TrainingProgress,
        tell: Callable[[Mapping[str, Any]], None] = lambda event: None,
        *,
        writes: bool = True,
    ) -> None:
        self._run, self._progress, self._tell, self._writes = run, progress, tell, writes
        self._file: TextIO | None = None

    @contextmanager
    def opened(self, length: int) -> Iterator[None]:
        """metrics.jsonl, cut to where the run stands: later lines belong to a lost future.

        Args:
            length: bytes that hold.
        """
        path = self._run.metrics if self._writes else Path(os.devnull)
        if self._writes:
            path.touch()
            os.truncate(path, length)
        with path.open("a", encoding="utf-8") as self._file:
            yield

    @property
    def length(self) -> int:
        """Bytes of metrics.jsonl."""
        assert self._file is not None
        return self._file.tell()

    def step(self, event: Mapping[str, Any]) -> None:
        """A step that was taken."""
        self._write(event)
        self._progress.update(event)

    def look(self, event: Mapping[str, Any], line: str | None = None) -> None:
        """What an observer found; `line` is the same for a person."""
        self._write(event)
        self._progress.look(event, line)

    def _write(self, event: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()
        self._tell(event)


def step_event(
    drawn: Drawn,
    names: Sequence[str],
    loss: Tensor,
    *,
    rate: float,
    norm: float,
    seconds: float,
) -> dict[str, Any]:
    """The line of one step; docs/layout.md says what each key means.

    Args:
        drawn: what it was made of.
        names: of the tasks.
        loss: ℓ summed by task, float64 [T].
        rate: its learning rate.
        norm: of the gradients before clipping.
        seconds: that it took.
    """
    supervised = drawn.supervised
    event: dict[str, Any] = {
        "event": "step",
        "step": drawn.number + 1,
        "epoch": drawn.epoch,
        "loss": float((loss * drawn.factors.double()).sum()) / int(supervised.sum()),
        "task_loss": {
            name: float(own) / int(count)
            for name, own, count in zip(names, loss, supervised, strict=True)
            if count
        },
        "examples": {names[task]: count for task, count in drawn.examples.items()},
        "supervised": int(supervised.sum()),
        "tokens": drawn.tokens,
        "learning_rate": rate,
        "gradient_norm": norm,
        "seconds": seconds,
    }
    if torch.cuda.is_available():
        event["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    event["tokens_per_second"] = drawn.tokens / max(1e-9, seconds)
    return event
