"""Rows as they come: JSON lines from a pipe, answered before the pipe has ended."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mtl_lora_cli.data.delimited import BY_ENDING, Layout
from mtl_lora_cli.data.file_formats import json_line
from mtl_lora_cli.data.large_files import read_rows
from mtl_lora_cli.errors import UsageError, file_problem
from mtl_lora_cli.pointers import require_content

Placed = tuple[Mapping[str, Any], str]  # a row and its place
_AHEAD = 1024  # lines that are read and not yet asked for


def read_parts(path: Path, most: int, layout: Layout = BY_ENDING) -> Iterator[list[Placed]]:
    """The rows of a file in parts of `most`; JSON lines are read as they are asked for.

    Args:
        path: of any format.
        most: rows of a part.
        layout: of tables as text.

    Raises:
        UsageError: the file or a row cannot be read.
    """
    if path.name.lower().endswith((".jsonl", ".ndjson")):
        try:
            with path.open("rb") as file:
                require_content(path, file.peek(1024))
                yield from stream_parts(file, str(path), most)
        except OSError as error:
            raise file_problem(str(path), f"cannot be read: {error.strerror}") from None
        return
    found = read_rows(path, layout)
    for start in range(0, len(found.rows), most):
        own = slice(start, start + most)
        yield list(zip(found.rows[own], found.places[own], strict=True))


def with_names(parts: Iterable[list[Placed]], names: Mapping[str, str]) -> Iterator[list[Placed]]:
    """The rows with other names for the fields that have an old one.

    Raises:
        UsageError: a row has a field of the old and one of the new name.
    """
    for part in parts:
        for row, place in part if names else ():
            for old, new in names.items():
                if old in row and new in row and new not in names:
                    raise UsageError(f"{place}: '{old}' is called '{new}' here, and both are there")
        yield (
            [
                ({names.get(name, name): value for name, value in row.items()}, place)
                for row, place in part
            ]
            if names
            else part
        )


def stream_parts(file: BinaryIO, name: str, most: int) -> Iterator[list[Placed]]:
    """JSON lines in parts: what has come by the time that a part is asked for, `most` at most.

    Whoever writes one row and waits for its answer gets it; whoever writes many has them answered
    together.

    Args:
        file: read by a thread of its own.
        name: as errors show it.
        most: rows of a part.

    Raises:
        UsageError: a line is no JSON object; what stands before it has been given.
    """
    lines: queue.Queue[bytes | OSError | None] = queue.Queue(_AHEAD)

    def read() -> None:
        try:
            for line in file:
                lines.put(line)
        except OSError as error:
            lines.put(error)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    number, ended = 0, False
    while not ended:
        part: list[Placed] = []
        fault: UsageError | None = None
        while len(part) < most and fault is None:
            try:
                line = lines.get(block=not part)
            except queue.Empty:
                break
            if isinstance(line, OSError):
                fault = file_problem(name, f"cannot be read: {line.strerror}")
            elif line is None:
                ended = True
                break
            else:
                number += 1
                try:
                    row = json_line(line, name, number)
                except UsageError as error:
                    fault = error
                else:
                    if row is not None:
                        part.append((row, f"{name}:{number}"))
        if part:
            yield part
        if fault is not None:
            raise fault
