"""One file of rows: JSON, JSON lines, CSV, TSV (each also packed by gzip or zstd), Parquet and Arrow.

A file is read whole here (large ones: large_files.py), and what is wrong with it is an error that names the file and the line: a row
that is quietly dropped or bent would be learned as if it were right.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, cast

import numpy as np

from mtl_lora_cli.data.delimited import BY_ENDING, Layout, Table, unique_columns
from mtl_lora_cli.data.lazy_rows import Lazy
from mtl_lora_cli.errors import UsageError, did_you_mean, file_problem
from mtl_lora_cli.pointers import require_content


@dataclass(frozen=True)
class Rows:
    """The rows of one split, and where each of them stands."""

    rows: Sequence[Mapping[str, Any]]
    file: str  # as errors show it: a file, or `hub:owner/name[config]/split`
    fingerprint: str  # the same for the same content only
    places: Sequence[str]  # of each row
    notes: tuple[str, ...] = ()  # what may have been read wrongly

    def where(self, index: int) -> str:
        """`path/file.jsonl:12`; `path/file.parquet, row 12` where there are no lines."""
        return self.places[index]

    def some(self, numbers: np.ndarray) -> list[Mapping[str, Any]]:
        """Those of these numbers, ascending."""
        if isinstance(self.rows, Lazy):
            return self.rows.take(numbers)
        return [self.rows[number] for number in numbers.tolist()]


_Numbered = Iterator[tuple[Any, int]]  # rows, each with the line on which it begins, or 0


def fingerprint(content: bytes) -> str:
    """The first 16 digits of its SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def ending(path: Path) -> str | None:
    """The ending that names the file's format, such as `.jsonl.gz`; None where it is unknown."""
    name = path.name.lower()
    return next((known for known in ENDINGS if name.endswith(known)), None)


def read_file(path: Path, layout: Layout = BY_ENDING) -> Rows:
    """Read one file in the format that its ending names.

    Args:
        path: a file with a known ending, or any file that `layout` gives a delimiter for.
        layout: how it is written, where its ending does not say it.

    Raises:
        UsageError: the file is missing, cannot be read, has an unknown ending, has no rows, is not
            what its ending says, or a Git LFS pointer.
    """
    file = str(path)
    known = ending(path)
    if known is None and layout.delimiter is None:
        raise file_problem(
            file,
            f"unknown ending, expected one of {KNOWN}; a table needs a delimiter in its source",
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise file_problem(file, f"cannot be read: {error.strerror}") from None
    require_content(path, data)
    plain = _unpacked(data, path)
    numbered, notes = _numbered(plain, file, known, layout)
    if not numbered:
        raise file_problem(file, "has no rows, expected at least one")
    rows = [row for row, _ in numbered]
    lines = [line for _, line in numbered]
    if lines[0] and len(set(lines)) == len(lines):
        places = [f"{file}:{line}" for line in lines]
    else:  # no lines, or several rows on one
        places = [f"{file}, row {number}" for number in range(1, len(rows) + 1)]
    for row, place in zip(rows, places, strict=True):
        if not isinstance(row, dict):
            raise UsageError(f"{place}: expected an object for each row, received {row!r:.60}")
    if isinstance(layout.columns, Mapping):
        rows = renamed(rows, layout.columns, file)
    content = data if layout == BY_ENDING else data + repr(layout).encode()
    return Rows(rows, file, fingerprint(content), places, tuple(notes))


def _unpacked(data: bytes, path: Path) -> bytes:
    """Raises UsageError where a compressed file is damaged."""
    if path.name.lower().endswith(".gz"):
        try:
            return gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise file_problem(path, f"not a whole gzip file: {error}") from None
    if path.name.lower().endswith(".zst"):
        import pyarrow

        try:
            found: bytes = pyarrow.input_stream(pyarrow.BufferReader(data), "zstd").read()
        except OSError as error:
            raise file_problem(path, f"not a whole zstd file: {error}") from None
        return found
    return data


def open_file(path: Path) -> IO[bytes]:
    """A file to be read in pieces; what is packed in it, if it is compressed.

    Raises:
        UsageError: it cannot be opened.
    """
    try:
        if path.name.lower().endswith(".gz"):
            return cast(IO[bytes], gzip.open(path))
        if path.name.lower().endswith(".zst"):
            import pyarrow

            return cast(IO[bytes], pyarrow.input_stream(str(path), "zstd"))
        return path.open("rb")
    except OSError as error:
        raise file_problem(path, f"cannot be read: {error.strerror}") from None


def print_of(path: Path, layout: Layout = BY_ENDING) -> str:
    """`fingerprint` of a file's bytes and of how they are read, without holding them.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256")
    if layout != BY_ENDING:
        found.update(repr(layout).encode())
    return found.hexdigest()[:16]


def _numbered(
    data: bytes, file: str, known: str | None, layout: Layout
) -> tuple[list[tuple[Any, int]], list[str]]:
    """The rows with their lines, and what may be wrong with them."""
    plain = (known or "").removesuffix(".gz").removesuffix(".zst")
    if plain in _READERS:
        if layout.of_tables and not layout.of_new_rows:
            raise file_problem(file, f"{layout.of_tables[0]} goes with CSV, TSV and the like only")
        return list(_READERS[plain](data, file)), []
    table = Table(text_of(data, file), file, *table_of(known, layout), layout)
    return list(table.rows()), table.notes


def table_of(known: str | None, layout: Layout) -> tuple[str, bool]:
    """The delimiter of a table as text, and whether quotation marks mean what they mean in CSV.

    Args:
        known: the file's ending.
        layout: what the source says of it; without an ending it has a delimiter.
    """
    plain = (known or "").removesuffix(".gz").removesuffix(".zst")
    delimiter = layout.delimiter or _DELIMITERS[plain]
    quoted = plain == ".csv" or (plain != ".tsv" and delimiter != "\t")
    if layout.quoting is not None:
        quoted = layout.quoting == "csv"
    return delimiter, quoted


def renamed(
    rows: list[Any], names: Mapping[str, str], file: str, *, all_there: bool = True
) -> list[Any]:
    """The rows with other names for some of their fields.

    Args:
        rows: all of a file.
        names: old name → new one.
        file: for errors.
        all_there: False: they are some of a file that has such fields.

    Raises:
        UsageError: no row has such a field, or a row has a field of the new name already.
    """
    known = dict.fromkeys(name for row in rows for name in row)
    for old, new in names.items():
        if all_there and old not in known:
            listed = ", ".join(list(known)[:20])
            message = f"columns: no column '{old}'{did_you_mean(old, known)}; there are: {listed}"
            raise file_problem(file, message)
        if new in known and new not in names:
            raise file_problem(file, f"columns: '{old}' cannot be called '{new}', as another is")
    return [{names.get(name, name): value for name, value in row.items()} for row in rows]


def text_of(data: bytes, file: str, first: int = 1) -> str:
    """Bytes as text, of which `first` is the first line.

    Raises:
        UsageError: they are no UTF-8, or hold a null byte.
    """
    data = data.removeprefix(codecs.BOM_UTF8)  # some editors and spreadsheets write it
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line, byte = first + data.count(b"\n", 0, error.start), data[error.start]
        raise file_problem(file, f"not UTF-8 text: byte 0x{byte:02x}", line=line) from None
    if "\0" in text:
        line = first + text[: text.index("\0")].count("\n")
        raise file_problem(file, "not text: has a null byte", line=line)
    return text


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key '{key}' stands twice")
    return fields


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"expected a number or null, received {word}")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
_VISIBLE = re.compile(r"[^ \t\r\n]|\Z")
# Half a character, `\ud83d` without its other half: valid JSON, but no text that can be tokenized.
_HALF_CHARACTER = re.compile(
    r"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..\\u[dD])[c-fC-F])"
)


class _Json(NamedTuple):
    """JSON text that stands in `file` from `line` on, read from a position that moves forward."""

    text: str
    file: str
    line: int = 1

    def value(self, position: int) -> tuple[Any, int]:
        """The value at a position, and the position of what follows it."""
        try:
            value, end = _DECODER.raw_decode(self.text, position)
            if _HALF_CHARACTER.search(self.text, position, end):
                json.dumps(value, ensure_ascii=False).encode()
            return value, self.visible(end)
        except json.JSONDecodeError as error:
            raise self.problem(error.msg[0].lower() + error.msg[1:], error.pos) from None
        except (ValueError, RecursionError) as error:
            raise self.problem(str(error), position) from None

    def visible(self, position: int) -> int:
        """The first position from here on that is not white space."""
        found = _VISIBLE.search(self.text, position)
        return found.start() if found else len(self.text)

    def expect_end(self, position: int, hint: str = "") -> None:
        if position < len(self.text):
            raise self.problem(f"more after the end{hint}", position)

    def problem(self, message: str, position: int) -> UsageError:
        line = self.line + self.text.count("\n", 0, position)
        column = position - self.text.rfind("\n", 0, position)
        return file_problem(self.file, f"not valid JSON: {message} (column {column})", line=line)


def _json_lines(data: bytes, file: str, first: int = 1) -> _Numbered:
    # Not splitlines(): a string may hold U+2028 and other ends of line that are none here.
    for number, text in enumerate(text_of(data, file, first).split("\n"), start=first):
        line = _Json(text, file, number)
        if (start := line.visible(0)) < len(text):
            row, end = line.value(start)
            line.expect_end(end)
            yield row, number


def json_line(data: bytes, file: str, number: int) -> dict[str, Any] | None:
    """One line of a JSON lines file as a row; None for an empty one.

    Raises:
        UsageError: it is no JSON object, or no text.
    """
    return next(json_rows(data, file, number), None)


def json_rows(data: bytes, file: str, first: int) -> Iterator[dict[str, Any]]:
    """The rows of some lines of a JSON lines file, of which `first` is the first.

    Raises:
        UsageError: one of them is no JSON object, or no text.
    """
    for row, number in _json_lines(data, file, first):
        if not isinstance(row, dict):
            raise UsageError(
                f"{file}:{number}: expected an object for each row, received {row!r:.60}"
            )
        yield row


def _json(data: bytes, file: str) -> _Numbered:
    source = _Json(text_of(data, file), file)
    start = source.visible(0)
    if source.text.startswith("[", start):
        yield from _json_array(source, start)
    elif start < len(source.text):
        top, end = source.value(start)
        source.expect_end(end, "; a file with an object on each line is named .jsonl")
        rows = top.get("data") if isinstance(top, dict) else None
        if not isinstance(rows, list):
            raise file_problem(
                file, f'expected an array or {{"data": [...]}}, received {top!r:.60}'
            )
        yield from ((row, 0) for row in rows)


def _json_array(source: _Json, position: int) -> _Numbered:
    """Element by element, because `json.loads` does not say on which line an element begins."""
    text, line, before = source.text, 1, 0
    end = source.visible(position + 1)
    more = not text.startswith("]", end)
    while more:
        line, before = line + text.count("\n", before, end), end
        row, end = source.value(end)
        yield row, line
        more = text.startswith(",", end)
        if more:
            end = source.visible(end + 1)
        elif not text.startswith("]", end):
            raise source.problem("expected ',' or ']'", end)
    source.expect_end(source.visible(end + 1))


def _parquet(data: bytes, file: str) -> _Numbered:
    from pyarrow import BufferReader, parquet

    yield from _columns(lambda: parquet.ParquetFile(BufferReader(data)).read(), file, "Parquet")


def _arrow(data: bytes, file: str) -> _Numbered:
    """A stream, as `datasets` writes it, or a file with its magic bytes."""
    from pyarrow import BufferReader, ipc

    reader = ipc.open_file if data.startswith(b"ARROW1") else ipc.open_stream
    yield from _columns(lambda: reader(BufferReader(data)).read_all(), file, "Arrow")


def _columns(read: Callable[[], Any], file: str, what: str) -> _Numbered:
    try:
        table = read()
        table.validate(full=True)  # else offsets that lead out of a damaged file are followed
        names = unique_columns(table.column_names, file, None)
        columns = [column.to_pylist() for column in table.columns]
    except arrow_faults() as error:
        raise file_problem(file, f"not a whole {what} file: {error}") from None
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True)), 0


def arrow_faults() -> tuple[type[Exception], ...]:
    """pyarrow's own errors: by no single base class."""
    import pyarrow

    return pyarrow.ArrowException, ValueError, OSError, ArithmeticError, MemoryError


_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_READERS: dict[str, Callable[[bytes, str], _Numbered]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
}
_TEXTS = (*_READERS, *_DELIMITERS)
PACKED = (".gz", ".zst")
ENDINGS = (*_TEXTS, *(f"{name}{how}" for how in PACKED for name in _TEXTS), ".parquet", ".arrow")
KNOWN = f"{', '.join(_TEXTS)} (each also {' and '.join(PACKED)}), .parquet, .arrow"  # in words
_READERS |= {".parquet": _parquet, ".arrow": _arrow}
