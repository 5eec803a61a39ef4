"""Rows with their answers, as they came: JSON lines to JSON lines, Parquet to Parquet, whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mtl_lora_cli.prediction.manifest import UNFINISHED
from mtl_lora_cli.prediction.reading import Chunk
from mtl_lora_cli.prediction.types import as_type
from mtl_lora_cli.runs.atomic import sync

Prediction = Mapping[str, Any]


class PartFile:
    """A part's answers on their way to the disk: in its place once it is closed, gone once it is dropped.

    Args:
        path: its place.
        column: the field that answers stand in.
        kind: the Arrow type of an answer; None: JSON lines.
    """

    def __init__(self, path: Path, column: str, kind: Any = None) -> None:
        self._path, self._column, self._kind = path, column, kind
        self._writer: Any = None
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
        self._temporary, self._file = Path(name), os.fdopen(handle, "wb")

    def write(self, chunk: Chunk, answers: Sequence[Prediction]) -> None:
        """The next rows, each with its answer.

        Raises:
            OSError: the disk is full, or fails otherwise: it names the file.
        """
        with _named(self._path):
            self._write(chunk, answers)

    def _write(self, chunk: Chunk, answers: Sequence[Prediction]) -> None:
        if isinstance(chunk.raw, list):
            lines = zip(chunk.raw, answers, strict=True)
            text = "".join(_joined(line, self._column, answer) for line, answer in lines)
            self._file.write(text.encode())
            return
        import pyarrow
        from pyarrow import parquet

        values = pyarrow.array([as_type(answer, self._kind) for answer in answers], type=self._kind)
        batch = pyarrow.RecordBatch.from_arrays(
            [*chunk.raw.columns, values],
            schema=chunk.raw.schema.append(pyarrow.field(self._column, self._kind)),
        )
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self._file, batch.schema)
        self._writer.write_batch(batch)

    def close(self) -> None:
        """All rows are written: from now on it is there.

        Raises:
            OSError: as of `write`.
        """
        try:
            with _named(self._path):
                if self._writer is not None:
                    self._writer.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._temporary.chmod(0o644)
                self._temporary.replace(self._path)
                sync(self._path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)

    def drop(self) -> None:
        """Leave nothing, on a full disk, too, where what is held cannot be written."""
        with suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A fault of a write says of which file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _joined(line: str, column: str, answer: Prediction) -> str:
    """A row's own text, to the last digit, with one more field."""
    said = json.dumps({column: answer}, ensure_ascii=False, allow_nan=False)
    inside = line[1:-1].strip()
    return f"{{{inside}, {said[1:]}\n" if inside else f"{said}\n"
