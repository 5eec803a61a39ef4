"""Folders outside a run."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where converted models and encoded data are kept: MTL_LORA_CACHE, or ~/.cache/mtl-lora."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mtl-lora"
    return Path(os.environ.get("MTL_LORA_CACHE", default)).expanduser()
