"""What the cache keeps: listed, claimed by one writer, and given up by age."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.runs.listing import files_of
from mtl_lora_cli.runs.paths import cache_folder

LIMIT = "MTL_LORA_CACHE_SIZE"
DEFAULT_LIMIT = "20GiB"
GIVEN_UP_ALONE = (
    "encoded",
)  # made again in seconds to minutes; a model may be read to a run's end

_IN_USE = 3600.0  # seconds after its last use in which an entry is not given up by itself
_ABANDONED = 86400.0  # seconds after which an unfinished file has no writer any more
_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_AGES = {"min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


@dataclass(frozen=True)
class Entry:
    """One file or folder of the cache.

    Attributes:
        kind: the folder of the cache that it lies in, such as `encoded`.
        bytes: of all its files.
        used: seconds since the epoch, when it was written or read to last.
        finished: False of what a writer left or still fills.
    """

    kind: str
    name: str
    path: Path
    bytes: int
    used: float
    finished: bool


def entries() -> list[Entry]:
    """All entries of the cache, the one that was not used for longest first."""
    found = [
        one
        for folder in _folders(cache_folder())
        for path in _children(folder)
        if (one := _entry(folder.name, path)) is not None
    ]
    return sorted(found, key=lambda one: (one.used, one.name))


def mark_used(path: Path) -> None:
    """Note that an entry was read now; a cache that cannot be written is no reason to stop."""
    with suppress(OSError):
        os.utime(path)


def give_up(
    *,
    size: int | None = None,
    age: float | None = None,
    kinds: tuple[str, ...] = (),
    in_use: float = 0.0,
) -> list[Entry]:
    """Remove entries that were not used for some time, and then the oldest until the others fit.

    Args:
        size: bytes that may stay, of the kinds named.
        age: seconds since their last use after which entries leave.
        kinds: folders of the cache to look at; all of them if empty.
        in_use: seconds since its last use in which an entry stays, whatever its size.

    Returns:
        What was removed.
    """
    now = time.time()
    known = [one for one in entries() if not kinds or one.kind in kinds]
    leaving = [one for one in known if not one.finished and _is_left(one, now)]
    staying = [one for one in known if one.finished]
    if age is not None:
        leaving += [one for one in staying if now - one.used >= age]
        staying = [one for one in staying if now - one.used < age]
    if size is not None:
        over = sum(one.bytes for one in staying) - size
        for one in staying:
            if over > 0 and now - one.used >= in_use:
                leaving.append(one)
                over -= one.bytes
    return [one for one in leaving if _remove(one.path)]


def keep_to_limit() -> list[Entry]:
    """What is done after an entry was written: the oldest of those that are quickly made again leave.

    Raises:
        UsageError: MTL_LORA_CACHE_SIZE is no size.
    """
    return give_up(size=limit(), kinds=GIVEN_UP_ALONE, in_use=_IN_USE)


def limit() -> int:
    """Bytes that encoded data may take: MTL_LORA_CACHE_SIZE, or 20 GiB.

    Raises:
        UsageError: it is no size.
    """
    return bytes_of(os.environ.get(LIMIT) or DEFAULT_LIMIT, LIMIT)


def bytes_of(text: str, what: str) -> int:
    """`20GiB` → bytes. Units: B, KiB to TiB (powers of 1,024), kB to TB (of 1,000).

    Raises:
        UsageError: it is no size; `what` says where it stands.
    """
    return int(_quantity(text, what, _UNITS, "a size such as 20GiB or 500MB"))


def seconds_of(text: str, what: str) -> float:
    """`30d` → seconds. Units: min, h, d, w.

    Raises:
        UsageError: it is no time; `what` says where it stands.
    """
    return _quantity(text, what, _AGES, "an age such as 12h, 30d or 8w")


@contextmanager
def claimed(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Only one process at a time is in this block for the same entry; the others wait.

    Who waited looks whether the entry is there now. The claim ends with its process, killed or not. Where no
    claim can be written (or locks do not reach), nobody waits: the entry is then made twice, and
    each of the two writes it whole.

    Args:
        path: of the entry.
        waiting: called once where another process has the claim.
    """
    lock = path.with_name(f".{path.name}.lock")
    handle = _claim(lock, waiting)
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                lock.unlink()
            os.close(handle)


def _claim(lock: Path, waiting: Callable[[], None]) -> int | None:
    told = False
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    told = True
                    waiting()
                fcntl.flock(handle, fcntl.LOCK_EX)
            # The one before removed its file: a lock on that holds nobody off.
            if _is_same(lock, handle):
                return handle
            os.close(handle)
    except OSError:
        return None


def _is_same(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return []


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix != ".lock")
    except OSError:
        return []


def _entry(kind: str, path: Path) -> Entry | None:
    try:
        known = path.lstat()
        size = sum(file.st_size for _, file in files_of(path)) if path.is_dir() else known.st_size
    except OSError:  # it left just now
        return None
    return Entry(kind, path.name, path, size, known.st_mtime, not path.name.startswith("."))


def _is_left(one: Entry, now: float) -> bool:
    """No process fills it: a folder's lock is free, a file was not written to for a day."""
    if not one.path.is_dir():
        return now - one.used >= _ABANDONED
    try:
        handle = os.open(one.path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return now - one.used >= _IN_USE


def _remove(path: Path) -> bool:
    """So that a reader finds all of it or nothing."""
    try:
        if not path.is_dir() or path.is_symlink():
            path.unlink()
            return True
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".removed"))
        path.replace(aside)
    except OSError:
        return False
    shutil.rmtree(aside, ignore_errors=True)
    return True


def _quantity(
    text: str, what: str, units: dict[str, float] | dict[str, int], expected: str
) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    unit = None if found is None else units.get(found[2].lower())
    if found is None or unit is None:
        raise UsageError(f"{what}: {text!r} is not {expected}")
    return float(found[1]) * unit
