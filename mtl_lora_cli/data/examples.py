"""Rows after their template, as encoding and evaluation take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtl_lora_cli.tasks.rendering import Example


@dataclass(frozen=True)
class Examples:
    """Rendered rows of one split.

    Attributes:
        split: the split's name.
        examples: rendered.
        wheres: file and line of each.
        rows: the rows themselves.
        fingerprint: hash of the rows.
        notes: what may have been read wrongly.
    """

    split: str
    examples: list[Example]
    wheres: list[str]
    rows: Sequence[Any]
    fingerprint: str
    notes: tuple[str, ...] = ()
