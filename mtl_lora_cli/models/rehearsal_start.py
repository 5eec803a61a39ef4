"""The process that compiles kernels (`rehearsal.py`), as a command has it: begun first of all, and waited for.

Loading libraries takes seconds and one core; compilers need the same libraries, and then all cores. So both go on
beside each other, and where nothing has to be compiled no process is begun. Nothing here loads a library.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from typing import Any

from mtl_lora_cli.models.files import CONFIG
from mtl_lora_cli.models.own_code import code_fingerprint
from mtl_lora_cli.resources import expanded
from mtl_lora_cli.runs.paths import cache_folder

_DRIVER = Path("/proc/driver/nvidia/version")
_CARDS = (
    _DRIVER,
    Path("/dev/nvidiactl"),
    Path("/dev/dxg"),
)  # of which one is there where a card is
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "MTL_LORA_KERNELS")
_LONGEST = 120.0  # seconds
_begun: list[Popen[str]] = []


def begin(module: str, request: Mapping[str, Any], kept: Path) -> None:
    """Begin to compile, where there is a card and something to compile.

    Args:
        module: of ours, which is run; see `rehearsal_process.py`.
        request: what it reads, in a line of JSON.
        kept: the file that is there once that is done (`kept_file`).
    """
    if is_kept(kept) or not any(place.exists() for place in _CARDS):
        return
    call = [sys.executable, "-P", "-m", module]
    process = Popen(call, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL, text=True)
    _begun.append(process)
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()


def wait() -> None:
    """Until what was begun has ended, however it has; never for long."""
    while _begun:
        process = _begun.pop()
        try:
            process.wait(_LONGEST)
        except TimeoutExpired:
            process.kill()
            process.wait()


def folder_of(name: str, beside: Path) -> Path | None:
    """A base model's folder, where a recipe names one on this disk; a relative path may be relative to `beside`."""
    path = expanded(name)
    return next((one for one in (path, beside / path) if (one / CONFIG).is_file()), None)


def kept_file(base: Path, **settings: Any) -> Path:
    """The file that is there once kernels lie in Triton's cache.

    Args:
        base: the base model's folder, of which the configuration is read.
        settings: what else they depend on, as JSON takes it.
    """
    parts = {
        "config": (base / CONFIG).read_text(encoding="utf-8"),
        "settings": settings,
        "driver": _DRIVER.read_text() if _DRIVER.is_file() else "",
        "environment": [os.environ.get(name) for name in _VARIABLES],
        "kept": str(_triton()),
        "versions": [_version(name) for name in ("torch", "transformers", "triton")],
        "code": code_fingerprint(),
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return cache_folder() / "kernels" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def is_kept(file: Path) -> bool:
    """Whether the file is there, and so is Triton's cache."""
    return file.is_file() and _triton().is_dir()


def _triton() -> Path:
    return Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache").expanduser()


def _version(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    return None
