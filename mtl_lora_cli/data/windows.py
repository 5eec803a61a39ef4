"""A mixture of streams: an epoch is a window of each, and of every other task all its examples."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mtl_lora_cli.data.encoded import EncodedSplit
from mtl_lora_cli.data.epoch_rows import EpochRows
from mtl_lora_cli.data.mixture import Mixture
from mtl_lora_cli.runs.atomic import write_text
from mtl_lora_cli.runs.paths import cache_folder

_KEPT = 2  # windows: the one that is learned, and the one after it
Encode = Callable[[int, int], EncodedSplit]


class Windows:
    """The examples of every task, window by window.

    Args:
        first: of window 0.
        streams: ids of the tasks that are streams; the others have the same examples in each.
        encode: the examples of a task and a window; the same whenever it is asked.
        identity: all that decides them.
    """

    def __init__(
        self, first: Sequence[EncodedSplit], streams: Sequence[int], encode: Encode, identity: str
    ) -> None:
        self.identity = identity
        self._first, self._streams, self._encode = list(first), frozenset(streams), encode
        self._kept: OrderedDict[int, list[EncodedSplit]] = OrderedDict()

    def splits(self, window: int) -> list[EncodedSplit]:
        """Of each task the examples of a window."""
        if window == 0:
            return self._first
        if window not in self._kept:
            self._kept[window] = [
                self._encode(task, window) if task in self._streams else own
                for task, own in enumerate(self._first)
            ]
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return self._kept[window]


@dataclass(frozen=True, eq=False)
class StreamMixture(Mixture):
    """A mixture whose epochs are windows. Each is drawn and laid in rows as an epoch of its examples would be.

    Attributes:
        windows: the examples.
    """

    windows: Windows = field(kw_only=True)
    _steps: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    _epochs: OrderedDict[int, EpochRows] = field(
        default_factory=OrderedDict, init=False, repr=False
    )

    def epoch(self, number: int) -> EpochRows:
        """The rows of one window, in the order in which they are learned."""
        if number not in self._epochs:
            keys: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(Mixture)}
            keys["lengths"] = tuple(own.positions for own in self.windows.splits(number))
            keys["epochs_before"] = self.epochs_before + number
            self._epochs[number] = Mixture(**keys).epoch(0)
            while len(self._epochs) > _KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def steps_in(self, epochs: float, at_most: int | None = None) -> int:
        """As many as are asked for: a stream has no end."""
        if at_most is None:
            raise ValueError("a stream has no end: the steps have to be said")
        return at_most

    def drawn_in(self, steps: int) -> list[int]:
        """Examples of each task in so many steps, were all windows like the first one."""
        of_first = self._epoch_steps(0)
        return [round(count * steps / of_first) for count in self.planned_counts()]

    def _epoch_steps(self, number: int) -> int:
        """Kept on disk, too: who goes on with a run does not fetch what lies behind it."""
        key = str(number)
        if not self._steps:
            with suppress(OSError, ValueError):
                self._steps.update(json.loads(self._file.read_text(encoding="utf-8")))
        if key not in self._steps:
            self._steps[key] = -(-len(self.epoch(number)) // self.rows_per_step)
            with suppress(OSError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                write_text(self._file, json.dumps(self._steps))
        return self._steps[key]

    @property
    def _file(self) -> Path:
        """Named by all that decides the rows of a window."""
        keys = [one.name for one in fields(Mixture) if one.name not in ("lengths", "beginnings")]
        known = [self.windows.identity, *(getattr(self, key) for key in keys)]
        name = hashlib.sha256(repr(known).encode()).hexdigest()[:32]
        return cache_folder() / "streams" / f"{name}.json"


def streaming(mixture: Mixture, windows: Windows) -> StreamMixture:
    """A mixture of the first windows as one of all of them."""
    keys: dict[str, Any] = {one.name: getattr(mixture, one.name) for one in fields(Mixture)}
    return StreamMixture(**keys, windows=windows)
