"""Plain aligned tables: they read the same on a terminal, in a log and in a mail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from textwrap import wrap

from mtl_lora_cli.visible import visible_line


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    """The first column aligned left, the others right, or all of them left."""
    lines = [[visible_line(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def shown(line: Sequence[str]) -> str:
        first, *others = [
            cell.ljust(width) if left or column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join([first, *others]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([shown(lines[0]), rule, *(shown(line) for line in lines[1:])])


def in_lines(rows: Sequence[Sequence[str]], most: Mapping[int, int]) -> list[list[str]]:
    """Rows whose long cells go on below themselves.

    Args:
        rows: of cells.
        most: column → characters that its cells have at most, between words.
    """
    found: list[list[str]] = []
    for row in rows:
        parts = [wrap(cell, most[n]) if n in most else [cell] for n, cell in enumerate(row)]
        found += [list(line) for line in zip_longest(*parts, fillvalue="")]
    return found


def binary_size(count: int) -> str:
    """1,536 → `1.5 KiB`."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def age(changed: float) -> str:
    """Since then, in the largest unit that has passed: `3 min`."""
    import time

    seconds = max(0.0, time.time() - changed)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
