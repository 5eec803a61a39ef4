"""A set that is never whole on this disk: its files, one after another, and again from the first.

A run takes `buffer` rows after another from it, and shuffles each of these windows. So the rows of a step follow from
its number: window w holds rows w · buffer to before (w + 1) · buffer, whoever asks, and whenever.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mtl_lora_cli.data.delimited import Layout
from mtl_lora_cli.data.file_formats import Rows, fingerprint
from mtl_lora_cli.data.large_files import read_rows
from mtl_lora_cli.data.lazy_rows import JoinedRows, Lazy, SelectedPlaces, SelectedRows
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.runs.atomic import write_text
from mtl_lora_cli.runs.paths import cache_folder


@dataclass(frozen=True)
class StreamPart:
    """One of its files.

    Attributes:
        name: as it is known where it lies.
        state: what changes when it does.
        fetch: gives a path at which it can be read, for as long as the context lasts.
    """

    name: str
    state: str
    fetch: Callable[[], AbstractContextManager[Path]]


@dataclass(frozen=True)
class PartStream:
    """The rows of some files, without an end.

    Args:
        parts: in their order.
        layout: how they are written.
        lenient: what is wrong with a row is told when it is read.
    """

    parts: Sequence[StreamPart]
    layout: Layout
    lenient: bool = False
    _counts: dict[str, int] = field(default_factory=dict, init=False)

    @property
    def fingerprint(self) -> str:
        """The same for the same files only."""
        known = [[one.name, one.state] for one in self.parts]
        return fingerprint(json.dumps([known, repr(self.layout)]).encode())

    def rows(self, first: int, count: int) -> Rows:
        """So many rows from one on; behind the last one comes the first.

        Of a file that is passed over it is remembered how many rows it has: it is fetched once for that.

        Raises:
            UsageError: a file cannot be had, or a row cannot be read.
        """
        self._remember()
        taken: list[Rows] = []
        at, missing = 0, count
        for part in self._endless():
            known = self._counts.get(part.name)
            if known is not None and first >= at + known:
                at += known
                continue
            whole = self._read(part)
            start = max(0, first - at)
            at += len(whole.rows)
            if start >= len(whole.rows):
                continue
            own = _some(whole, start, min(len(whole.rows), start + missing))
            taken.append(own)
            missing -= len(own.rows)
            if not missing:
                break
        return Rows(
            rows=JoinedRows([one.rows for one in taken]),
            file=taken[0].file,
            fingerprint=fingerprint(f"{self.fingerprint} {first} {count}".encode()),
            places=SelectedPlaces([one.places for one in taken]),
            notes=tuple(
                dict.fromkeys([*(note for one in taken for note in one.notes), *self._short(count)])
            ),
        )

    def _short(self, window: int) -> list[str]:
        """What is good to know of a window that has rows twice."""
        known = [self._counts.get(part.name) for part in self.parts]
        rows = sum(count for count in known if count is not None)
        if None in known or rows >= window:
            return []
        return [
            f"the stream has {rows:,} rows, fewer than its buffer ({window:,}): within each {window:,} rows that are "
            f"shuffled together they stand {window / rows:.1f} times; buffer: {rows} makes an epoch of a window"
        ]

    def _endless(self) -> Iterator[StreamPart]:
        while True:
            yield from self.parts
            if not sum(self._counts.values()):
                raise UsageError(f"{self.parts[0].name}: the stream has no rows")

    def _read(self, part: StreamPart) -> Rows:
        with part.fetch() as path, droppable(drops=self.lenient):
            found = read_rows(
                path, self.layout, lenient=self.lenient
            )  # large ones stay open, with or without their name
        if self._counts.get(part.name) != len(found.rows):
            self._counts[part.name] = len(found.rows)
            self._keep()
        return found

    @property
    def _file(self) -> Path:
        return cache_folder() / "streams" / f"{self.fingerprint}.json"

    def _remember(self) -> None:
        if not self._counts:
            try:
                self._counts.update(json.loads(self._file.read_text(encoding="utf-8")))
            except (OSError, ValueError):
                return

    def _keep(self) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._file, json.dumps(self._counts))
        except OSError:
            return  # they are counted again


@contextmanager
def droppable(*, drops: bool) -> Iterator[None]:
    """What is wrong with a row of a stream, and how to leave it out.

    Args:
        drops: such rows are left out already.

    Raises:
        UsageError: in the place of another one.
    """
    try:
        yield
    except UsageError as error:
        cure = "broken_rows: drop in the source leaves such rows out"
        if drops or cure in str(error):
            raise
        raise UsageError(f"{error.lines[0]}; {cure}") from None


def _some(rows: Rows, first: int, last: int) -> Rows:
    numbers = np.arange(first, last)
    own = SelectedRows(rows.rows, numbers) if isinstance(rows.rows, Lazy) else rows.rows[first:last]
    places = SelectedPlaces([rows.places], numbers)
    return Rows(own, rows.file, rows.fingerprint, places, rows.notes)


def local_part(path: Path) -> StreamPart:
    """A file that lies on this disk."""

    @contextmanager
    def fetch() -> Iterator[Path]:
        yield path

    known = path.stat()  # a label that is mended leaves the size as it is
    return StreamPart(str(path), f"{known.st_size} {known.st_mtime_ns}", fetch)
