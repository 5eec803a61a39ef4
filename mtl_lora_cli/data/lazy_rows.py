"""Rows that are read when they are asked for: of a file only where each begins is kept in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar, overload

import numpy as np

from mtl_lora_cli.errors import file_problem

Row = Mapping[str, Any]
T = TypeVar("T")
_BLOCK = 512  # rows that are read together


class Lazy(Sequence[T]):
    """A sequence of which a subclass says how long it is, and gives some that stand together."""

    def between(self, first: int, last: int) -> list[T]:
        """Those from `first` to before `last`.

        Raises:
            UsageError: one of them is wrong; it names file and line.
        """
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            numbers = range(*index.indices(len(self)))
            if numbers.step == 1:
                return self.between(numbers.start, max(numbers.start, numbers.stop))
            return self.take(np.asarray(numbers, dtype=np.int64))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.between(index % len(self), index % len(self) + 1)[0]

    def __iter__(self) -> Iterator[T]:
        for first in range(0, len(self), _BLOCK):
            yield from self.between(first, min(first + _BLOCK, len(self)))

    def take(self, numbers: np.ndarray) -> list[T]:
        """Those of these numbers, in their order; what stands close together is read together."""
        found: list[T] = []
        for begin in range(0, len(numbers), _BLOCK):
            some = numbers[begin : begin + _BLOCK]
            first, last = int(some.min()), int(some.max()) + 1
            if last - first <= 4 * len(some) + 16:
                rows = self.between(first, last)
                found += [rows[number - first] for number in some.tolist()]
            else:
                found += [self.between(number, number + 1)[0] for number in some.tolist()]
        return found


LazyRows = Lazy[Row]


class TextRows(LazyRows):
    """Rows of a text file.

    Args:
        file: it is read at places, so that forks of this process may share it.
        starts: int64 [rows + 1], the byte at which each row begins, and where the last one ends.
        lines: int [rows], the line of each.
        parse: rows from the bytes of some, with the line of the first of them.
        name: of the file, for errors.
    """

    def __init__(
        self,
        file: IO[bytes],
        starts: np.ndarray,
        lines: np.ndarray,
        parse: Callable[[bytes, int], list[Row]],
        name: str,
    ) -> None:
        self._file, self._starts, self._lines = file, starts, lines
        self._parse, self._name = parse, name

    def __len__(self) -> int:
        return len(self._lines)

    def between(self, first: int, last: int) -> list[Row]:
        """See `Lazy.between`."""
        if first >= last:
            return []
        begin, end = int(self._starts[first]), int(self._starts[last])
        data = b"".join(_read(self._file.fileno(), begin, end))
        rows = self._parse(data, int(self._lines[first]))
        if len(rows) != last - first:
            raise file_problem(self._name, "was changed while it was read")
        return rows


def _read(handle: int, begin: int, end: int) -> Iterator[bytes]:
    while begin < end:
        data = os.pread(handle, end - begin, begin)
        if not data:
            return  # it was cut since
        yield data
        begin += len(data)


class ArrowRows(LazyRows):
    """Rows of an Arrow table, such as one that is mapped into memory.

    Args:
        table: a `pyarrow.Table`.
        names: of its columns.
        check: is given what is to be read, before it is.
    """

    def __init__(
        self, table: Any, names: Sequence[str], check: Callable[[Any], None] = lambda part: None
    ) -> None:
        self._table, self._names, self._check = table, list(names), check

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def between(self, first: int, last: int) -> list[Row]:
        """See `Lazy.between`."""
        part = self._table.slice(first, last - first)
        self._check(part)
        columns = [column.to_pylist() for column in part.columns]
        return [
            dict(zip(self._names, values, strict=True)) for values in zip(*columns, strict=True)
        ]


class SelectedRows(LazyRows):
    """Some of other rows.

    Args:
        rows: all of them.
        numbers: int64, those that are kept.
    """

    def __init__(self, rows: LazyRows, numbers: np.ndarray) -> None:
        self._rows, self._numbers = rows, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def between(self, first: int, last: int) -> list[Row]:
        """See `Lazy.between`."""
        return self._rows.take(self._numbers[first:last])


class JoinedRows(LazyRows):
    """Rows of several files behind each other."""

    def __init__(self, parts: Sequence[Sequence[Row]]) -> None:
        self._parts = parts
        self._starts = np.concatenate([[0], np.cumsum([len(one) for one in parts])])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def between(self, first: int, last: int) -> list[Row]:
        """See `Lazy.between`."""
        found: list[Row] = []
        for part, start in zip(self._parts, self._starts.tolist(), strict=False):
            begin, end = max(first - start, 0), min(last - start, len(part))
            if begin < end:
                found += part[begin:end]
        return found


class Renamed(LazyRows):
    """Rows with other names for some of their fields.

    Args:
        rows: with the names of the file.
        rename: some of them with the other names.
    """

    def __init__(self, rows: LazyRows, rename: Callable[[list[Row]], list[Row]]) -> None:
        self._rows, self._rename = rows, rename

    def __len__(self) -> int:
        return len(self._rows)

    def between(self, first: int, last: int) -> list[Row]:
        """See `Lazy.between`."""
        return self._rename(self._rows.between(first, last))


class _Spelled(Sequence[str]):
    """Texts that are made when they are asked for."""

    def at(self, number: int) -> str:
        """The one of a number from 0 on."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self.at(number) for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.at(index % len(self))


class Places(_Spelled):
    """Where rows stand, spelled when it is asked for.

    Args:
        file: as errors show it.
        count: of its rows.
        lines: int [rows], the line of each; None: the file has no lines.
    """

    def __init__(self, file: str | Path, count: int, lines: np.ndarray | None = None) -> None:
        self._file, self._count, self._lines = str(file), count, lines

    def __len__(self) -> int:
        return self._count

    def at(self, number: int) -> str:
        """See `_Spelled.at`."""
        if self._lines is None:
            return f"{self._file}, row {number + 1}"
        return f"{self._file}:{self._lines[number]}"


class SelectedPlaces(_Spelled):
    """Some of other places.

    Args:
        places: by file all of them.
        numbers: int64, those that are kept, through all files; None: all.
    """

    def __init__(self, places: Sequence[Sequence[str]], numbers: np.ndarray | None = None) -> None:
        self._places, self._numbers = places, numbers
        self._starts = np.concatenate([[0], np.cumsum([len(one) for one in places])])

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._numbers is None else len(self._numbers)

    def at(self, number: int) -> str:
        """See `_Spelled.at`."""
        number = number if self._numbers is None else int(self._numbers[number])
        part = int(np.searchsorted(self._starts, number, "right")) - 1
        return self._places[part][number - int(self._starts[part])]
