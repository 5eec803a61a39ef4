"""How much there is to learn from, before anything is rendered or encoded: about so many tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl_lora_cli.data.sources import available_splits, read_split
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.recipe.source import Source

_CHARACTERS = 4  # of a token of English text
_AROUND = 16  # tokens that a template adds to a row
_LOOKED_AT = 500  # rows of a source


def amount(sources: Sequence[tuple[str, Source]]) -> tuple[int, int] | None:
    """Tokens of all training rows and of the longest one, about; None where a source is not at hand.

    Nothing is fetched from a hub. Of each source the first five hundred rows say how long a row is.

    Args:
        sources: task → where its rows are.
    """
    total, longest = 0, 0
    for task, source in sources:
        try:
            rows = None if source.hub else read_split(source, "train", base=Path(), task=task)
        except MtlLoraError:  # `validate` says so, with file and line
            rows = None
        if rows is None or not len(rows.rows):
            return None
        lengths = list(_lengths(rows.rows[:_LOOKED_AT]))
        total += len(rows.rows) * sum(lengths) // len(lengths)
        longest = max(longest, *lengths)
    return (total, longest) if total else None


def held_out(sources: Sequence[tuple[str, Source]]) -> bool:
    """Whether one of the sources at hand has a validation split; nothing is fetched from a hub."""
    for task, source in sources:
        try:
            if not source.hub and "validation" in available_splits(source, base=Path(), task=task):
                return True
        except MtlLoraError:  # `validate` says so, with file and line
            continue
    return False


def _lengths(rows: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    for row in rows:
        yield sum(map(_characters, row.values())) // _CHARACTERS + _AROUND


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    if isinstance(value, Sequence):
        return sum(map(_characters, value))
    return 1
