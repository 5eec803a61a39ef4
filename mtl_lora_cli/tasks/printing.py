"""What a template may print: texts, numbers and dates.

Whatever else Python would print for it, `None`, `['a', 'b']`, `<built-in method items of dict object
at 0x7f…>`, is a text that no one means, and the last one is another in every process.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date, time, timedelta
from functools import wraps
from numbers import Number
from typing import Any

from jinja2 import Environment, Undefined, pass_environment
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.runtime import LoopContext, TemplateReference

_PRINTED = (
    str,
    Number,
    date,
    time,
    timedelta,
    uuid.UUID,
    Undefined,
)  # the last one raises by itself
# Filters that make a text of whatever they get.
_TEXT_FILTERS = (
    *("trim", "lower", "upper", "capitalize", "title", "string", "replace", "truncate", "indent"),
    *(
        "wordwrap",
        "center",
        "striptags",
        "e",
        "escape",
        "forceescape",
        "safe",
        "wordcount",
        "urlize",
    ),
)
_WORDS: dict[type, str] = {LoopContext: "loop", TemplateReference: "self"}
_NOTHING = object()


class NotPrintableError(ValueError):
    """A text would show a value as Python writes it.

    Attributes:
        value: what would be shown.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        super().__init__(f"{_what(value)} would be printed")

    def advice(self, row: Mapping[str, Any]) -> str:
        """Where in the row it stands, and what to write instead."""
        value = self.value
        if value is None:
            nulls = [str(name) for name, other in row.items() if other is None]
            return (
                f"null in this row: {', '.join(nulls) or 'no field'}; where a null is right, say "
                "what to print instead, as in {{ brand or 'unknown' }}"
            )
        if type(value) in _WORDS:
            word = _WORDS[type(value)]
            return f"'{word}' is a word of Jinja's here; a field of that name is row['{word}']"
        if callable(value):
            place = next(_places(getattr(value, "__self__", None), row), "it")
            return f"in this row {place} has no field of that name"
        place = next(_places(value, row), "")
        at = f"in this row: {place}; " if place else ""
        return f"{at}{_instead(value).replace('NAME', place or 'x')}"


def printable(value: Any) -> Any:
    """The value, if it is a text, a number or a date.

    Raises:
        NotPrintableError: it is null, a list, a dictionary, bytes, NaN, a method, or the like.
    """
    if type(value) is str or (isinstance(value, _PRINTED) and _is_itself(value)):
        return value
    raise NotPrintableError(value)


def _is_itself(value: Any) -> bool:
    """Not NaN or infinite, of whatever kind of number, nor a date that is none."""
    if isinstance(value, Undefined):
        return True
    return value == value and value not in (float("inf"), float("-inf"))


def _what(value: Any) -> str:
    if value is None:
        return "a null"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"bytes ({bytes(value[:20])!r})"
    if type(value) in _WORDS:
        return f"what Jinja calls '{_WORDS[type(value)]}'"
    if callable(value):
        return f"the method '{getattr(value, '__name__', type(value).__name__)}'"
    if isinstance(value, Number | date):
        return f"{value}, which is no number,"
    kinds = ((Mapping, "a dictionary"), (list, "a list"), (tuple, "a tuple"), (set, "a set"))
    kind = next((name for known, name in kinds if isinstance(value, known)), None)
    if kind is None:
        return f"a Python {type(value).__name__}"
    text = repr(value)
    return f"{kind} ({text if len(text) <= 60 else text[:57] + '...'})"


def _instead(value: Any) -> str:
    """How to write it, for a value that is found at NAME."""
    if isinstance(value, bytes | bytearray | memoryview):
        return "say how to read them, as in {{ NAME.decode('utf-8') }}"
    if isinstance(value, Mapping):
        return "name one of its fields, as in {{ NAME.field }}, or print all: {{ NAME | tojson }}"
    if isinstance(value, Number | date):
        return "say what to print instead, as in {{ NAME if NAME == NAME else 'unknown' }}"
    return "say how, as in {{ NAME | join(', ') }}"


def _places(value: Any, row: Any, path: str = "") -> Iterator[str]:
    """Where in a row this very value stands: `basket.items`, `tags[0]`."""
    if value is row:
        yield path or "row"
    elif isinstance(row, Mapping):
        for name, below in row.items():
            yield from _places(value, below, f"{path}.{name}" if path else str(name))
    elif isinstance(row, list | tuple):
        for number, below in enumerate(row):
            yield from _places(value, below, f"{path}[{number}]")


def _of_text(text_filter: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, for what may be printed; Jinja's own go on with the word `None`.

    Those that want Jinja's context first, as `replace` does, get it first.
    """
    place = 1 if hasattr(text_filter, "jinja_pass_arg") else 0

    @wraps(text_filter)
    def refuse(*arguments: Any, **options: Any) -> Any:
        printable(arguments[place])
        return text_filter(*arguments, **options)

    return refuse


def _format(text: Any, *values: Any, **named: Any) -> Any:
    """Jinja's `format`, of what may be printed."""
    for value in (text, *values, *named.values()):
        printable(value)
    return FILTERS["format"](text, *values, **named)


@pass_environment
def _join(environment: Environment, values: Any, between: str = "", attribute: Any = None) -> str:
    """Jinja's `join`, of lists of what may be printed: it would cut a text into letters."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        received = "a text" if isinstance(values, str) else _what(values)
        raise ValueError(
            f"join: expected a list, received {received}; letters are joined by | list | join"
        )
    if attribute is not None:
        values = map(make_attrgetter(environment, attribute), values)
    return str(between).join(str(printable(value)) for value in values)


def _number(name: str) -> Callable[..., Any]:
    """Jinja's `int` or `float`, but what is no number is an error unless a default is given."""
    convert = FILTERS[name]

    def strict(value: Any, default: Any = _NOTHING, *arguments: Any, **options: Any) -> Any:
        found = convert(value, default, *arguments, **options)
        if found is _NOTHING:
            raise ValueError(f"{name}: expected a number, received {value!r:.60}")
        return found

    return strict


def _json(value: Any, indent: int | None = None) -> str:
    """JSON as it is; Jinja's `tojson` writes the signs of HTML as numbers."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)


PRINTING_FILTERS: dict[str, Callable[..., Any]] = {
    **{name: _of_text(FILTERS[name]) for name in _TEXT_FILTERS},
    "format": _format,
    "join": _join,
    "int": _number("int"),
    "float": _number("float"),
    "tojson": _json,
}
