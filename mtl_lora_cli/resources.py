"""Where the recipes and templates that come with the package lie.

In a wheel they stand inside the package; in a checkout they stand at its top level.
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def bundled(name: str) -> Path:
    """The folder `recipes` or `data_templates`, whatever the working directory."""
    inside = _PACKAGE / "bundled" / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def expanded(path: str | Path) -> Path:
    """A path with `~` filled in; where there is no home folder `~` stays, and is not found."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's own raises then
