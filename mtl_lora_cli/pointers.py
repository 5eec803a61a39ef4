"""Files that stand in the place of others: Git LFS pointers, and web pages saved under a file's name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mtl_lora_cli.errors import UsageError

_LFS = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html")
_LONGEST = 1024  # bytes of a pointer, by its specification


def require_content(path: Path, start: bytes) -> None:
    """Refuse a file that is not what its name says, by how it begins.

    Raises:
        UsageError: a Git LFS pointer, or a web page.
    """
    if start.startswith(_LFS):
        raise UsageError(f"{path} is a Git LFS pointer, not the file: git lfs pull")
    if start[:64].lstrip().lower().startswith(_PAGES):
        raise UsageError(f"{path} is a web page, not the file: download the file itself")


def require_contents(files: Iterable[Path]) -> None:
    """Look at those that are as small as a pointer.

    Raises:
        UsageError: one of them is a pointer, or a web page.
    """
    for path in files:
        if path.is_file() and path.stat().st_size <= _LONGEST:
            require_content(path, path.read_bytes())
