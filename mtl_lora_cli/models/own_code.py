"""A fingerprint of the code that decides what our path computes."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

_ROOMS = ("models", "engine", "adapters", "kernels")


@cache
def code_fingerprint() -> str:
    """Of every file of these rooms."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for room in _ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
