"""The process that a check runs in, as whoever asks has it: begun early, and ended with the one who asks.

Loading its libraries takes as long as loading ours. So a command that will check begins it first of all
(`ready`), and both load beside each other. Nothing here loads a library.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from subprocess import PIPE, Popen

_ready: list[Popen[str]] = []  # begun, and not asked anything yet


@contextmanager
def ready() -> Iterator[None]:
    """Inside, the first check finds a process that was begun with the block."""
    process = _begun()
    _ready.append(process)
    try:
        yield
    finally:
        if process in _ready:
            _ready.remove(process)
            _end(process)


@contextmanager
def started() -> Iterator[Popen[str]]:
    """A process that waits for a request; it ends with the block."""
    process = _ready.pop() if _ready else _begun()
    try:
        yield process
    finally:
        _end(process)


def send(process: Popen[str], line: str) -> None:
    """Say something to it; that it is gone shows when it is listened to."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(f"{line}\n")
        process.stdin.flush()


def _begun() -> Popen[str]:
    # -P: a folder of the user's that is called like a library must not be imported.
    call = [sys.executable, "-P", "-m", "mtl_lora_cli.export.check_process"]
    return Popen(call, stdin=PIPE, stdout=PIPE, text=True)


def _end(process: Popen[str]) -> None:
    """It ends when nobody speaks to it any more."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    process.stdout.close()
    process.wait()
