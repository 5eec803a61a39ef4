"""The rows of a part, some at a time: with their places for errors, and as they came, to be written again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl_lora_cli.data.file_formats import json_line
from mtl_lora_cli.errors import UsageError, file_problem
from mtl_lora_cli.prediction.inputs import Part, opened_lines, reading

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Fault:
    """A row that cannot be answered.

    Attributes:
        file: its path below the input folder.
        row: its number in the file, from 1; of JSON lines its line.
        error: one line: where it stands, what was received, what was expected.
    """

    file: str
    row: int
    error: str

    def to_json(self) -> dict[str, Any]:
        """For a journal."""
        return {"file": self.file, "row": self.row, "error": self.error}


@dataclass(frozen=True)
class Chunk:
    """Rows that are answered together.

    Attributes:
        rows: as templates read them, each with its place.
        numbers: of the rows in their file, from 1.
        raw: as they came: lines of JSON, or a `pyarrow.RecordBatch`.
        faults: of rows that are not among them, because they could not be read.
    """

    rows: list[tuple[Row, str]]
    numbers: list[int]
    raw: Any
    faults: list[Fault]

    def alone(self, place: int) -> Chunk:
        """One of the rows, to be asked by itself."""
        return Chunk([self.rows[place]], [self.numbers[place]], [], [])

    def without(self, faults: Mapping[int, Fault]) -> Chunk:
        """The same but for some rows, by their places among `rows`."""
        kept = [place for place in range(len(self.rows)) if place not in faults]
        raw = [self.raw[n] for n in kept] if isinstance(self.raw, list) else self.raw.take(kept)
        return Chunk(
            [self.rows[n] for n in kept],
            [self.numbers[n] for n in kept],
            raw,
            [*self.faults, *faults.values()],
        )


@dataclass(frozen=True)
class Reading:
    """How parts are read.

    Attributes:
        root: the input folder.
        names: other names of fields, as templates know them; what is written keeps the file's own.
        column: where answers will stand, so that no row may have such a field.
        lenient: rows that cannot be read are passed over.
    """

    root: Path
    names: Mapping[str, str]
    column: str
    lenient: bool

    def chunks(self, part: Part, size: int) -> Iterator[Chunk]:
        """The rows of a part, `size` at a time.

        Raises:
            UsageError: a row cannot be read, or the file has changed since it was planned.
        """
        read = self._batches if part.is_parquet else self._lines
        with reading(self.root / part.file):
            yield from read(part, size)

    def _lines(self, part: Part, size: int) -> Iterator[Chunk]:
        path, digest = self.root / part.file, hashlib.sha256()
        with opened_lines(path, part.offset) as file:
            for start in range(0, part.rows, size):
                lines = [file.readline() for _ in range(min(size, part.rows - start))]
                digest.update(b"".join(lines))
                yield self._chunk_of_lines(part, part.first + start, lines)
        if digest.hexdigest() != part.digest:
            raise changed(path)

    def _chunk_of_lines(self, part: Part, first: int, lines: list[bytes]) -> Chunk:
        chunk = Chunk([], [], [], [])
        file = str(self.root / part.file)
        for number, line in enumerate(lines, start=first + 1):
            try:
                row = json_line(line, file, number)
                if row is not None:
                    placed = self._placed(row, f"{file}:{number}")
                    chunk.rows.append(placed)
                    chunk.numbers.append(number)
                    chunk.raw.append(line.decode().strip().removeprefix("\ufeff"))
            except UsageError as error:
                if not self.lenient:
                    raise
                chunk.faults.append(Fault(part.file, number, error.lines[0]))
        return chunk

    def _batches(self, part: Part, size: int) -> Iterator[Chunk]:
        first = part.first
        for batch in _slices(self.root / part.file, part, size):
            yield self._chunk_of_batch(part, first, batch)
            first += len(batch)

    def _chunk_of_batch(self, part: Part, first: int, batch: Any) -> Chunk:
        path = self.root / part.file
        if self.column in batch.schema.names:
            raise file_problem(path, taken(self.column))
        start = first + 1
        rows = [
            self._placed(row, f"{path}, row {number}")
            for number, row in enumerate(batch.to_pylist(), start=start)
        ]
        return Chunk(rows, list(range(start, start + len(rows))), batch, [])

    def _placed(self, row: Row, where: str) -> tuple[Row, str]:
        """A row under the names that templates know.

        Raises:
            UsageError: two fields of it would have one name.
        """
        if self.column in row:
            raise UsageError(f"{where}: {taken(self.column)}")
        if not self.names:
            return row, where
        for old, new in self.names.items():
            if old in row and new in row and new not in self.names:
                raise UsageError(f"{where}: '{old}' is called '{new}' here, and both are there")
        return {self.names.get(name, name): value for name, value in row.items()}, where


def _slices(path: Path, part: Part, size: int) -> Iterator[Any]:
    """The rows of a part as record batches of at least `size` rows, but for the last one."""
    from pyarrow import Table, parquet

    held: list[Any] = []
    with parquet.ParquetFile(path) as table:
        groups, skip = _groups_of(table, part)
        wanted = part.rows
        for batch in table.iter_batches(size, row_groups=groups):
            own = batch.slice(min(skip, len(batch)), wanted)
            skip, wanted = max(0, skip - len(batch)), wanted - len(own)
            held.append(own)
            if sum(map(len, held)) >= size or (wanted == 0 and len(own)):
                yield from Table.from_batches(held).combine_chunks().to_batches()
                held = []
            if wanted == 0:
                return
    raise changed(path)


def _groups_of(table: Any, part: Part) -> tuple[list[int], int]:
    """The row groups that a part's rows stand in, and how many rows stand before it in the first of them."""
    groups: list[int] = []
    before = skip = 0
    for number in range(table.num_row_groups):
        count = table.metadata.row_group(number).num_rows
        if before + count > part.first and before < part.first + part.rows:
            skip = skip if groups else part.first - before
            groups.append(number)
        before += count
    return groups, skip


def taken(column: str) -> str:
    """What is said of rows that have the column for answers already."""
    return f"has a field '{column}' already, where answers go; --answer-column names another"


def changed(path: Path) -> UsageError:
    """What is said of a file that was written to meanwhile."""
    return file_problem(path, "has changed while it was read; start again when it is whole")
