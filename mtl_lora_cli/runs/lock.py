"""One writer of a run at a time: a lock of the operating system, which ends with its process.

The lock (flock) is on the file `.lock` of the run folder, which says who holds it and goes with its
holder. What a killed process leaves is an unlocked file, which stops nobody.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.visible import tell

LOCK_FILE = ".lock"
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_TRIES, _PAUSE = 5, 0.02  # who only looks holds the lock for a moment, too


@contextmanager
def only_writer(run: RunFolder, doing: str | None = None) -> Iterator[None]:
    """Nobody else writes into the run meanwhile.

    On a file system without locks this says so and goes on.

    Args:
        run: the run, or another folder.
        doing: what another one is told of it; default: `run 'NAME' is being trained`.

    Raises:
        UsageError: another process does, by its number; or the run is gone.
        OSError: nobody can write there.
    """
    path = run.path / LOCK_FILE
    handle = _acquired(path, run, doing)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()} {socket.gethostname()}\n".encode())
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: see `_acquired`
        os.close(handle)


def _acquired(path: Path, run: RunFolder, doing: str | None) -> int:
    """The lock's file, open and locked; it is the one that lies there, not one that was removed."""
    for attempt in range(_TRIES):
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError as error:
            raise UsageError(f"{run.path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                tell(
                    f"note: the file system of {run.path} has no locks ({error.strerror}): nothing keeps "
                    "a second process from writing there"
                )
                return handle
            os.close(handle)
            if attempt + 1 < _TRIES:
                time.sleep(_PAUSE)
            continue
        if _is_at(handle, path):
            return handle
        os.close(handle)
    raise _refused(run, writer_of(run) or "another process", doing)


def require_idle(run: RunFolder) -> None:
    """Refuse a run that somebody writes into, before anything else is done.

    Raises:
        UsageError: another process does, by its number.
    """
    writer = writer_of(run)
    if writer is not None:
        raise _refused(run, writer)


def _refused(run: RunFolder, writer: str, doing: str | None = None) -> UsageError:
    doing = doing or f"run '{run.name}' is being trained"
    return UsageError(f"{doing} by {writer}; wait for it, or stop it first")


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def writer_of(run: RunFolder) -> str | None:
    """Who writes into a run, `process 1234`, of another host with its name; None: nobody."""
    try:
        handle = os.open(run.path / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError as error:
        if error.errno not in _HELD:
            return None
        number, _, host = os.read(handle, 300).decode(errors="replace").strip().partition(" ")
        elsewhere = f" of {host}" if host and host != socket.gethostname() else ""
        return f"process {number}{elsewhere}" if number.isdecimal() else "another process"
    finally:
        os.close(handle)


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Processes that change something small in a folder do it one after another."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
