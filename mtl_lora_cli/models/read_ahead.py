"""A model's files read by the system while this process does something else: loads libraries, encodes rows."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.files import weight_files
from mtl_lora_cli.resources import expanded

_SHARE = (
    0.5  # of the memory that is free, which the files may take: what is needed must not go for them
)


def read_ahead(name: str | Path, beside: Path | None = None) -> None:
    """Begin to read a folder's weights into the system's memory; what is no folder here, or too large, is left.

    Args:
        name: a base model as a recipe spells it, or its folder.
        beside: folder that a relative path is relative to, besides the working directory.
    """
    path = expanded(str(name))
    places = [path] if beside is None or path.is_absolute() else [path, beside / path]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        return
    with suppress(UsageError, OSError):  # whoever loads it says what is wrong
        files = weight_files(folder)
        if sum(file.stat().st_size for file in files) <= _SHARE * _free():
            threading.Thread(target=_read, args=(files,), daemon=True).start()


def _read(files: Sequence[Path]) -> None:
    for file in files:
        with suppress(OSError, AttributeError), file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _free() -> int:
    """Bytes of memory that processes may still take."""
    import psutil

    return int(psutil.virtual_memory().available)
