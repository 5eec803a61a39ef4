"""Text of strangers as a terminal may have it: its control characters are shown, not sent.

A row, a label, a file's name or another program's message may hold codes that move the cursor, change a
window's title or answer for the user. Line ends and tabs stay.
"""

from __future__ import annotations

import re
import sys

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_OF_A_LINE = re.compile("[\x00-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    r"""The text with every control character but line ends and tabs as Python spells it, `\x1b`."""
    return _CONTROL.sub(_spelled, text)


def visible_line(text: str) -> str:
    r"""The same, line ends and tabs spelled, too, `\n`: for a cell of a table."""
    return _OF_A_LINE.sub(_spelled, text)


def visible_json(text: str) -> str:
    r"""A JSON document that means the same and holds no control character but line ends and tabs.

    JSON itself asks for escapes below U+0020 only; a terminal may take U+009B for the start of a code.
    """
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def tell(text: str) -> None:
    """A message to the person at the terminal."""
    print(visible(text), file=sys.stderr, flush=True)


def _spelled(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1]
