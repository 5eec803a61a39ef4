"""Rows in an object store or on the hub, by their address: `s3://…`, `gs://…`, `hf://…`, whatever fsspec opens.

Files are copied beside the cache once, and again when they changed there; they are read from there.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from mtl_lora_cli.data.file_formats import ending
from mtl_lora_cli.data.part_stream import StreamPart
from mtl_lora_cli.errors import UsageError, file_problem
from mtl_lora_cli.runs import kept
from mtl_lora_cli.runs.atomic import write_text
from mtl_lora_cli.runs.paths import cache_folder
from mtl_lora_cli.visible import tell

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*(::[^:]+)?://")
_BESIDE = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes beside the rows
_DEPTH = 5
_KIND = "remote"


def is_address(path: str) -> bool:
    """Whether a source's path is no place on this disk."""
    return bool(_ADDRESS.match(path))


@lru_cache
def copied(address: str, key: str, left_out: frozenset[str] = frozenset()) -> Path:
    """The file or folder at an address, copied to this disk: what holds rows, by its ending.

    Args:
        address: as fsspec takes it.
        key: the source's, for errors.
        left_out: files that stay where they are.

    Raises:
        UsageError: it cannot be reached, there is nothing, or what reads such addresses is not installed.
    """
    with reached(address, key) as (system, root):
        single = system.isfile(root)
        files = [
            one for one in ([root] if single else files_at(system, root)) if one not in left_out
        ]
        if not files and not left_out:
            raise file_problem(address, "no such file, or a folder that holds no rows", key=key)
        folder = cache_folder() / _KIND / hashlib.sha256(address.encode()).hexdigest()[:16]
        name = Path(root).name
        copies = {
            folder / (name if single else file[len(root) :].lstrip("/")): file for file in files
        }
        folder.mkdir(parents=True, exist_ok=True)
        with kept.claimed(folder, lambda: tell(f"{address}: another process copies it")):
            for to, file in copies.items():
                fetch(system, file, to)
            for old in [one for one in folder.rglob("*") if one.name[0] != "." and one.is_file()]:
                if old not in copies:  # it is no longer there
                    old.unlink()
        kept.mark_used(folder)
        return folder / name if single else folder


@contextmanager
def reached(address: str, key: str) -> Iterator[tuple[Any, str]]:
    """The file system of an address, and the path in it; what goes wrong with it is one line.

    Raises:
        UsageError: it cannot be reached, or what reads such addresses is not installed.
    """
    import fsspec

    try:
        yield fsspec.core.url_to_fs(address)
    except UsageError:
        raise
    except ImportError as error:
        raise file_problem(address, f"cannot be read: {_line(error)}", key=key) from None
    except Exception as error:  # of many libraries, by no single base class
        raise file_problem(address, f"cannot be reached: {_line(error)}", key=key) from None


def files_at(system: Any, root: str) -> list[str]:
    """The files of rows below a folder, in order of name."""
    found = system.find(root, maxdepth=_DEPTH)
    return sorted(one for one in found if ending(Path(one)) or Path(one).name in _BESIDE)


def fetch(system: Any, file: str, to: Path) -> None:
    """Copy one file, if it is not there as it is now."""
    state = state_of(system, file)
    mark = to.with_name(f".{to.name}.state")
    if to.is_file() and mark.is_file() and mark.read_text(encoding="utf-8") == state:
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(f".{to.name}.part")
    _copy(system, file, part)
    part.replace(to)
    write_text(mark, state)


def _copy(system: Any, file: str, to: Path) -> None:
    with system.open(file, "rb") as source, to.open("wb") as out:
        shutil.copyfileobj(source, out, 2**23)


def state_of(system: Any, file: str) -> str:
    """What changes when a file does: its checksum as the store knows it, or its size and time."""
    return f"{system.size(file)} {system.ukey(file)}"


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def parts_at(address: str, key: str, chosen: Callable[[str], bool]) -> list[StreamPart]:
    """Files at an address as parts of a stream: copied while they are read, and removed then.

    Args:
        address: of a file, or of a folder.
        key: the source's, for errors.
        chosen: whether a file is one of them, by its path below the folder.

    Raises:
        UsageError: it cannot be reached.
    """
    with reached(address, key) as (system, root):
        single = system.isfile(root)
        names = [root] if single else files_at(system, root)
        own = [one for one in names if single or chosen(one[len(root) :].lstrip("/"))]
        return [
            StreamPart(one, state_of(system, one), partial(_while_read, address, key, one))
            for one in own
        ]


@contextmanager
def _while_read(address: str, key: str, file: str) -> Iterator[Path]:
    folder = cache_folder() / "streams"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as name:
        path = Path(name) / Path(file).name
        with reached(address, key) as (system, _):
            _copy(system, file, path)
        yield path
