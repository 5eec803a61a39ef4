"""How many of the machine's cores this process may use."""

from __future__ import annotations

import os


def cores() -> int:
    """Those it is bound to, where the system says so."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Most of decoding a picture happens outside of Python's lock.
DECODING_THREADS = max(2, min(16, cores()))
