"""The end of a process, in order and at once."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End as Python does, but for taking millions of objects apart, which the system does at once.

    Threads that have to end by themselves are waited for, what is registered for the end is done, and what was
    printed is written.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
