"""Rows after their template, as encoding and evaluation take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        first: number of the first of them, where they are some of a split.
    """

    split: str
    examples: Sequence[Example]
    wheres: Sequence[str]
    rows: Sequence[Any]
    fingerprint: str
    notes: tuple[str, ...] = ()
    first: int = 0

    def part(self, first: int, last: int | None) -> Examples:
        """Some of them."""
        own = slice(first, last)
        return replace(
            self,
            examples=self.examples[own],
            wheres=self.wheres[own],
            rows=self.rows[own],
            first=self.first + first,
        )
