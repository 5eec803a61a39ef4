"""A large file of rows: looked through once, then read where rows are asked for.

Of text it is kept where each row begins (12 bytes a row); Arrow is mapped, and Parquet is written as Arrow once.
What was compressed is unpacked first. Such files have no name, and go with the process.
"""

from __future__ import annotations

import csv
import os
import tempfile
import zlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from mtl_lora_cli.data.delimited import BY_ENDING, Layout, Table, unique_columns
from mtl_lora_cli.data.file_formats import (
    PACKED,
    Rows,
    arrow_faults,
    ending,
    json_rows,
    open_file,
    print_of,
    read_file,
    renamed,
    table_of,
    text_of,
)
from mtl_lora_cli.data.lazy_rows import ArrowRows, LazyRows, Places, Renamed, Row, TextRows
from mtl_lora_cli.errors import did_you_mean, file_problem
from mtl_lora_cli.pointers import require_content
from mtl_lora_cli.runs.paths import cache_folder

LARGE = 2**25  # bytes from which on a file is not read whole
_PACKED_BY = 4  # at least so many times as much holds a compressed one
_BLOCK = 2**23  # bytes that are looked at together
_BATCH = 2**16  # rows of Parquet that are written together
_BOM = b"\xef\xbb\xbf"
_LOOKED_AT = 2**24  # bytes of a table, for what may be read wrongly
Found = tuple[LazyRows, "np.ndarray | None", list[str]]  # rows, their lines, what may be wrong


def read_rows(path: Path, layout: Layout = BY_ENDING, *, lenient: bool = False) -> Rows:
    """The rows of a file, which are read when they are asked for where it is large: see `read_file`.

    JSON that is one array, and tables of which broken rows are dropped, are read whole.

    Args:
        path: of the file.
        layout: how it is written.
        lenient: what is wrong with a row is told when it is read, also of a small file.

    Raises:
        UsageError: as `read_file`; of a large file what is wrong with a row is told when it is read.
    """
    found = _found(path, layout, lenient) if lenient or _is_large(path) else None
    if found is None or not len(found[0]):
        return read_file(path, layout)
    rows, lines, notes = found
    if isinstance(layout.columns, Mapping):
        rows = rows_renamed(rows, layout.columns, str(path))
    places = Places(path, len(rows), lines)
    return Rows(rows, str(path), print_of(path, layout), places, tuple(notes))


def _is_large(path: Path) -> bool:
    try:
        size = path.stat().st_size
    except OSError:
        return False
    return size * (_PACKED_BY if path.name.lower().endswith(PACKED) else 1) > LARGE


def _found(path: Path, layout: Layout, lenient: bool) -> Found | None:
    """What a large file holds; None where it has to be read whole, be it to say what is wrong with it."""
    known = ending(path)
    plain = (known or "").removesuffix(".gz").removesuffix(".zst")
    if plain == ".json" or (known is None and layout.delimiter is None):
        return None
    if plain in (".jsonl", ".ndjson", ".parquet", ".arrow") and layout.of_tables:
        return None
    if plain in (".parquet", ".arrow"):
        return _arrow(path, plain)
    file = _plain(path)
    if plain in (".jsonl", ".ndjson"):
        starts, lines = _lines(file, white=b" \t\r\n")
        parse = partial(_json_lines, file=str(path))
        return TextRows(file, starts, lines, parse, str(path)), lines, []
    return _table(file, path, layout, lenient)


def _json_lines(data: bytes, line: int, *, file: str) -> list[Row]:
    return list(json_rows(data, file, line))


def _plain(path: Path) -> IO[bytes]:
    """The file, or what is packed in it, to be read at places."""
    source = open_file(path)
    if not path.name.lower().endswith(PACKED):
        require_content(path, os.pread(source.fileno(), 1024, 0))
        return source
    unpacked = _temporary()
    with source:
        while data := _next(source, path):
            unpacked.write(data)
    unpacked.flush()
    return unpacked


def _next(source: IO[bytes], path: Path) -> bytes:
    try:
        return source.read(_BLOCK)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise file_problem(path, f"not a whole compressed file: {error}") from None


def _temporary() -> Any:
    """A file without a name, beside the cache where that can be written."""
    folder = cache_folder()
    place = str(folder) if os.access(folder, os.W_OK) else None
    return tempfile.NamedTemporaryFile(dir=place)


def _lines(file: IO[bytes], white: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where each line that is not empty begins, and where the last one ends; and the lines' numbers.

    Args:
        file: of text.
        white: bytes of which an empty line may be made.
    """
    handle = file.fileno()
    size = os.fstat(handle).st_size
    offset = 3 if os.pread(handle, 3, 0) == _BOM else 0
    found, doubtful, begins = [np.empty(0, np.int64)], [np.empty(0, bool)], True
    while data := os.pread(handle, _BLOCK, offset):
        values = np.frombuffer(data, np.uint8)
        places = np.flatnonzero(values == 10) + 1
        inside = np.concatenate([np.zeros(int(begins), np.int64), places[places < len(data)]])
        found.append(inside + offset)
        doubtful.append(np.isin(values[inside], np.frombuffer(white, np.uint8)))
        begins, offset = data.endswith(b"\n"), offset + len(data)
    starts = np.concatenate([*found, [size]])
    kept = np.ones(len(starts) - 1, dtype=bool)
    for number in np.flatnonzero(np.concatenate(doubtful)).tolist():
        line = os.pread(handle, int(starts[number + 1] - starts[number]), int(starts[number]))
        kept[number] = bool(line.strip(white))
    lines = (np.flatnonzero(kept) + 1).astype(np.int32)
    return np.concatenate([starts[:-1][kept], [size]]), lines


def _table(file: IO[bytes], path: Path, layout: Layout, lenient: bool) -> Found | None:
    delimiter, quoted = table_of(ending(path), layout)
    index = None if layout.broken_rows == "drop" else _records(file, delimiter, quoted)
    if index is None or len(index[1]) < 2:
        return None
    starts, lines = index
    end = starts[np.searchsorted(starts, _LOOKED_AT, "right") - 1]
    name, begin = str(path), int(starts[0])
    text = text_of(os.pread(file.fileno(), int(end) - begin, begin), name)
    looked_at = replace(layout, broken_rows="drop") if lenient else layout
    head = Table(text, name, delimiter, quoted, looked_at, first=int(lines[0]))
    first = min((line for _, line in head.rows()), default=None)
    if first is None or head.names is None:
        return None
    rows = np.searchsorted(lines, first)
    names = head.names

    def parse(data: bytes, line: int) -> list[Row]:
        text = text_of(data, name, line)
        part = Table(text, name, delimiter, quoted, layout, first=line, names=names)
        return [row for row, _ in part.rows()]

    notes = [] if lenient else head.notes
    return TextRows(file, starts[rows:], lines[rows:], parse, name), lines[rows:], notes


def _records(file: IO[bytes], delimiter: str, quoted: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """Where each record begins, and its line; None where that is not clear from the lines."""
    if not quoted:
        starts, lines = _lines(file, white=b"\r\n")
        return (starts, lines) if len(lines) > 1 else None
    csv.field_size_limit(2**31 - 1)
    begins, numbers = array("q"), array("i")
    at = 0

    def fed() -> Iterator[str]:
        nonlocal at
        file.seek(0)
        for line in file:
            text = line.decode()
            at += len(line)
            yield text.removeprefix("\ufeff") if at == len(line) else text

    reader = csv.reader(fed(), delimiter=delimiter, strict=True)
    begin, number = 0, 1
    try:
        for record in reader:
            if record:
                begins.append(begin)
                numbers.append(number)
            begin, number = at, reader.line_num + 1
    except (csv.Error, ValueError):
        return None
    begins.append(at)
    return np.asarray(begins, dtype=np.int64), np.asarray(numbers, dtype=np.int32)


def _arrow(path: Path, kind: str) -> Found:
    import pyarrow

    what = "Parquet" if kind == ".parquet" else "Arrow"
    with open_file(path) as file:
        require_content(path, file.read(1024))
    try:
        table = _from_parquet(path) if kind == ".parquet" else _mapped(str(path))
    except arrow_faults() as error:
        raise file_problem(path, f"not a whole {what} file: {error}") from None

    def check(part: pyarrow.Table) -> None:
        try:
            part.validate(full=True)
        except arrow_faults() as error:
            raise file_problem(path, f"not a whole {what} file: {error}") from None

    return ArrowRows(table, unique_columns(table.column_names, str(path), None), check), None, []


def _mapped(path: str) -> Any:
    """The table of an Arrow file or stream, without its pages."""
    from pyarrow import ipc, memory_map

    source = memory_map(path)
    magic = source.read(6)
    source.seek(0)
    return (ipc.open_file if magic == b"ARROW1" else ipc.open_stream)(source).read_all()


def _from_parquet(path: Path) -> Any:
    """The same rows in an Arrow stream that is mapped."""
    from pyarrow import ipc, parquet

    source = parquet.ParquetFile(path, memory_map=True)
    with _temporary() as plain:
        with ipc.new_stream(plain, source.schema_arrow) as writer:
            for batch in source.iter_batches(_BATCH):
                writer.write_batch(batch)
        plain.flush()
        return _mapped(plain.name)  # its pages stay, its name goes


def rows_renamed(rows: LazyRows, names: Mapping[str, str], file: str) -> Renamed:
    """Lazy rows with other names for some of their fields.

    Raises:
        UsageError: no row has such a field.
    """
    missing, known = set(names), dict[str, None]()
    for row in rows:
        missing.difference_update(row)
        if not missing:
            break
        known.update(dict.fromkeys(islice(row, 100)))
    for old in names:
        if old in missing:
            listed = ", ".join(list(known)[:20])
            message = f"columns: no column '{old}'{did_you_mean(old, known)}; there are: {listed}"
            raise file_problem(file, message)
    return Renamed(rows, partial(_some_renamed, names=names, file=file))


def _some_renamed(rows: list[Row], *, names: Mapping[str, str], file: str) -> list[Row]:
    return renamed(rows, names, file, all_there=False)
