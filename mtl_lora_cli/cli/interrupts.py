"""Ctrl-C at any time: one line and exit code 130.

Python raises KeyboardInterrupt wherever it happens to be. While a module is imported that is often in
code that turns it into another error, or drops it. So there, and outside of a command's frame, where
nothing is being written, the process leaves at once.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 130  # errors.ExitCode.INTERRUPTED; this module imports nothing that takes time
_IMPORT = "<frozen importlib._bootstrap>"

asked = False  # the user has asked to stop: whatever fails from now on fails by that
framed = False  # a command is inside of its frame, which tells how it ends


def listen() -> None:
    """From now on; where Ctrl-C is ignored, as in a shell's background, it stays so."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupted)


def _interrupted(number: int, frame: FrameType | None) -> None:
    global asked
    if not framed or _importing(frame):
        os.write(2, b"error: interrupted\n")
        os._exit(INTERRUPTED)
    asked = True
    raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT:
            return True
        frame = frame.f_back
    return False
