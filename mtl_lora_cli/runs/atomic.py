"""Writing so that a reader finds the old thing or the new one, never half of it."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_BEGIN_TO_WRITE = 2  # SYNC_FILE_RANGE_WRITE of Linux


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it into it."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it into it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON; numbers that JSON does not know (NaN, infinity) are an error."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder filled beside its place and renamed into it when the block ends well.

    The name of the unfinished folder starts with a dot and ends in `.partial`; it is removed when
    the block fails. What a killed process left of the same folder is removed first. `path` must not
    exist, or be an empty folder. All is on the disk before the name is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    lock = _locked(temporary)
    try:
        yield temporary
        for entry in temporary.rglob("*"):
            # Some writers leave files that only their owner can read. A second name of somebody
            # else's file is left as it is.
            if entry.is_file() and entry.stat().st_nlink == 1:
                entry.chmod(0o644)
            sync(entry)
        temporary.chmod(0o755)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _remove_leftovers(path: Path) -> None:
    """Remove unfinished folders of this name whose writers are gone: nobody holds their lock."""
    for entry in path.parent.iterdir():
        if entry.name.startswith(f".{path.name}.") and entry.suffix == ".partial":
            lock = _locked(entry)
            if lock is not None:
                shutil.rmtree(entry, ignore_errors=True)
                os.close(lock)


def _locked(folder: Path) -> int | None:
    """A lock on a folder that ends with this process, or None where another one holds it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def sync(path: Path) -> None:
    """Have a file's or a folder's content on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def begin_sync(path: Path) -> None:
    """Have the disk begin with a file's content, and wait for nothing; `sync` tells later how that ended."""

    def begin() -> None:
        with suppress(
            OSError, AttributeError
        ):  # a file that is gone, a system that has no such call
            handle = os.open(path, os.O_RDONLY)
            try:
                call = ctypes.CDLL(None).sync_file_range
                call(handle, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(_BEGIN_TO_WRITE))
            finally:
                os.close(handle)

    threading.Thread(target=begin, daemon=True).start()


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
