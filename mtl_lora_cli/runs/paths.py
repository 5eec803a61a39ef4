"""Folders outside a run."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.resources import expanded
from mtl_lora_cli.visible import tell

ANOTHER_CACHE = "MTL_LORA_CACHE names another folder"


def cache_folder() -> Path:
    """Where converted models and encoded data are kept: MTL_LORA_CACHE, or ~/.cache/mtl-lora.

    Raises:
        UsageError: there is no home folder, and a folder of that name in the place for temporary files is
            somebody else's.
    """
    named = os.environ.get("MTL_LORA_CACHE")
    if named:
        return expanded(named)
    above = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return _without_home() if above.parts[:1] == ("~",) else above / "mtl-lora"


@cache
def _without_home() -> Path:
    """Of this user alone, as a home would be: what lies in a cache is believed."""
    folder = Path(tempfile.gettempdir()) / f"mtl-lora-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        known = folder.lstat()
        own = known.st_uid == os.geteuid() and not known.st_mode & 0o022 and not folder.is_symlink()
    except OSError:
        own = False
    if not own:
        raise UsageError(f"there is no home folder, and {folder} cannot be used; {ANOTHER_CACHE}")
    tell(f"note: there is no home folder; the cache is {folder}; {ANOTHER_CACHE}")
    return folder


def existing(folder: Path) -> Path:
    """The folder itself or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def require_writable(folder: Path, what: str) -> None:
    """Refuse, before the work, a folder that cannot be written; it need not be there yet.

    Args:
        folder: what will be written, or a folder above it.
        what: for the error, such as `--output merged`.

    Raises:
        UsageError: a file stands in its way, or nothing can be written there.
    """
    there = existing(folder)
    if not there.is_dir():
        raise UsageError(f"{what}: {there} is a file, expected a folder")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UsageError(f"{what}: {there} cannot be written: {error.strerror}") from None


def require_replaceable(path: Path, what: str, holds: str, marks: tuple[bytes, ...]) -> None:
    """Refuse to put a file in the place of one that this program did not write; an empty one may go.

    Args:
        path: what will be written.
        what: for the error, such as `--predictions rows.jsonl`.
        holds: what it should hold, in words.
        marks: with the first its content begins, the others stand in its first 2,000 bytes.

    Raises:
        UsageError: it is no file, or holds something else.
    """
    if not path.exists():
        return
    begin = b"?"
    if path.is_file():
        with path.open("rb") as file:
            begin = file.read(2000)
    if begin.strip() and not (begin.startswith(marks[0]) and all(one in begin for one in marks)):
        raise UsageError(f"{what}: exists and holds no {holds}; choose another file")


def require_cache(folder: Path) -> None:
    """Make a folder of the cache, before work that would be lost without it.

    Raises:
        UsageError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"the cache folder {folder} cannot be written: {error.strerror}; {ANOTHER_CACHE}"
        ) from None
