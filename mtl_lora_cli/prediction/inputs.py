"""What is predicted: the files of a folder, cut into parts that are answered one by one.

A part is some rows of one file. Its fingerprint is a hash of its own bytes (JSON lines) or of its file
(Parquet): a part that is done is known again although other rows of its file were mended.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from mtl_lora_cli.errors import UsageError, file_problem
from mtl_lora_cli.pointers import require_content

LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
PACKED = (".gz", ".zst")
_KNOWN = (*(f"{name}{how}" for name in LINES for how in ("", *PACKED)), *PARQUET)
# Rows in other forms, which would be lost without a word; anything else, such as pictures, is passed over.
_OTHER_ROWS = (".json", ".csv", ".tsv", ".arrow", ".orc", ".avro", ".feather")
_BLOCK = 2**22  # bytes
_THREADS = 8


@dataclass(frozen=True)
class Part:
    """Some rows of a file.

    Attributes:
        file: its path below the input folder.
        number: of the part among those of its file.
        first: the number of its first row (of its first line) in the file, from 0.
        rows: how many it has; of JSON lines how many lines.
        offset: of JSON lines the byte at which it begins, unpacked.
        digest: its fingerprint.
    """

    file: str
    number: int
    first: int
    rows: int
    offset: int
    digest: str

    @property
    def name(self) -> str:
        """Of its output, without an ending."""
        return f"{_without_ending(self.file)}-{self.number:05d}"

    @property
    def is_parquet(self) -> bool:
        """Whether its rows stand in columns."""
        return self.file.lower().endswith(PARQUET)


@dataclass(frozen=True)
class InputFile:
    """A file with its parts.

    Attributes:
        name: its path below the input folder.
        size, changed: bytes, and the time of the last change in ns, by which it is known again.
        parts: in the order of its rows.
    """

    name: str
    size: int
    changed: int
    parts: tuple[Part, ...]

    def to_json(self) -> dict[str, Any]:
        """For a manifest."""
        own = [[one.first, one.rows, one.offset, one.digest] for one in self.parts]
        return {**asdict(self), "parts": own}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> InputFile:
        """The inverse of `to_json`."""
        name = content["name"]
        parts = tuple(Part(name, number, *own) for number, own in enumerate(content["parts"]))
        return cls(name, content["size"], content["changed"], parts)


def find_files(place: Path) -> tuple[Path, list[str]]:
    """The folder that names are relative to, and the files of rows in it, all of one form.

    What begins with `_` or `.` is passed over, as Spark and others do.

    Args:
        place: a folder, or one file.

    Raises:
        UsageError: there is none, or rows stand in forms that are not read here.
    """
    if place.is_file():
        root, names = place.parent, [place.name]
    elif place.is_dir():
        root, names = place, sorted(_below(place))
    else:
        raise file_problem(place, "no such file or folder")
    rows = [name for name in names if name.lower().endswith(_KNOWN)]
    other = [name for name in names if _is_other(name)]
    if other or not rows:
        found = f"received {other[0]}" if other else "there is none"
        raise file_problem(place, f"expected files that end in {', '.join(_KNOWN)}; {found}")
    forms = {name.lower().endswith(PARQUET): name for name in reversed(rows)}
    if len(forms) > 1:
        raise file_problem(
            place, f"expected Parquet or JSON lines, received both: {forms[True]}, {forms[False]}"
        )
    _require_apart(place, rows)
    return root, rows


def _below(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and not any(one.startswith(("_", ".")) for one in name.parts):
            yield name.as_posix()


def _is_other(name: str) -> bool:
    plain = name.lower()
    for how in PACKED:
        plain = plain.removesuffix(how)
    return plain.endswith(_OTHER_ROWS)


def _require_apart(place: Path, names: Sequence[str]) -> None:
    """Refuse two files whose answers would be written to one."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(_without_ending(name), name)
        if other != name:
            raise file_problem(place, f"{other} and {name} would be written to files of one name")


def _without_ending(name: str) -> str:
    found = next(one for one in sorted(_KNOWN, key=len)[::-1] if name.lower().endswith(one))
    return name[: -len(found)]


def plan(
    root: Path, names: Sequence[str], part_rows: int, known: Mapping[str, InputFile]
) -> list[InputFile]:
    """The parts of files; what has not changed is not read again.

    Args:
        root: the input folder.
        names: of files in it.
        part_rows: rows of a part at most.
        known: files as they were planned before, by name.

    Raises:
        UsageError: a file cannot be read.
    """

    def planned(name: str) -> InputFile:
        path = root / name
        with reading(path):
            state = path.stat()
            before = known.get(name)
            if before and (before.size, before.changed) == (state.st_size, state.st_mtime_ns):
                return before
            cut = _parquet_parts if path.name.lower().endswith(PARQUET) else _line_parts
            parts = tuple(cut(path, name, part_rows))
            return InputFile(name, state.st_size, state.st_mtime_ns, parts)

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(planned, names))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What libraries raise of a damaged file is one line.

    Raises:
        UsageError: in the place of anything else.
    """
    import pyarrow

    try:
        yield
    except UsageError:
        raise
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise file_problem(path, f"not a whole gzip file: {error}") from None
    except (pyarrow.ArrowException, OSError) as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise file_problem(path, f"cannot be read: {said:.200}") from None


def opened_lines(path: Path, offset: int = 0) -> BinaryIO:
    """A file of JSON lines, unpacked, from a byte on."""
    ending = path.suffix.lower()
    if ending == ".gz":
        packed = cast(BinaryIO, gzip.open(path, "rb"))  # noqa: SIM115 - whoever asked closes it
        packed.seek(offset)
        return packed
    if ending == ".zst":
        import pyarrow

        stream = pyarrow.input_stream(str(path), compression="zstd")
        while offset:
            offset -= len(stream.read(min(offset, _BLOCK)))
        return cast(BinaryIO, _Buffered(stream))
    file = path.open("rb")
    if offset == 0:
        require_content(path, file.peek(1024))
    file.seek(offset)
    return file


class _Buffered:
    """Lines of a stream that has blocks alone."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._rest = stream, b""

    def read(self, size: int) -> bytes:
        if self._rest:
            found, self._rest = self._rest[:size], self._rest[size:]
            return found
        return bytes(self._stream.read(size))

    def readline(self) -> bytes:
        while (end := self._rest.find(b"\n") + 1) == 0:
            block = bytes(self._stream.read(_BLOCK))
            if not block:
                end = len(self._rest)
                break
            self._rest += block
        found, self._rest = self._rest[:end], self._rest[end:]
        return found

    def __enter__(self) -> _Buffered:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()


def _line_parts(path: Path, name: str, rows: int) -> Iterator[Part]:
    number = first = offset = lines = position = 0
    digest, last = hashlib.sha256(), b"\n"
    with opened_lines(path) as file:
        while block := file.read(_BLOCK):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + 1
            cut = used = 0
            while lines + len(ends) - used >= rows:
                used += rows - lines
                end = int(ends[used - 1])
                digest.update(block[cut:end])
                yield Part(name, number, first, rows, offset, digest.hexdigest())
                number, first, offset = number + 1, first + rows, position + end
                cut, lines, digest = end, 0, hashlib.sha256()
            lines += len(ends) - used
            digest.update(block[cut:])
            position, last = position + len(block), block[-1:]
    if position > offset:
        yield Part(name, number, first, lines + (last != b"\n"), offset, digest.hexdigest())


def _parquet_parts(path: Path, name: str, rows: int) -> Iterator[Part]:
    from pyarrow import parquet

    with path.open("rb") as file:
        require_content(path, file.peek(1024))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with parquet.ParquetFile(path) as table:
        groups = [table.metadata.row_group(n).num_rows for n in range(table.num_row_groups)]
    first = 0
    for number, count in enumerate(_cut(groups, rows)):
        yield Part(name, number, first, count, 0, digest)
        first += count


def _cut(groups: Sequence[int], most: int) -> Iterator[int]:
    """Rows of each part: whole groups together as long as there is room; larger ones are cut."""
    held = 0
    for group in groups:
        if held and held + group > most:
            yield held
            held = 0
        held += group
        while held > most:
            yield most
            held -= most
    if held:
        yield held
