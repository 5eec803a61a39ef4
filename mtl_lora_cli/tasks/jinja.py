"""The small language of templates: Jinja texts and expressions, in a sandbox.

Templates come from strangers as files, so they run sandboxed: they read the row that they are
given and change nothing. They must also be the same on every reading, hence no random functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping
from functools import wraps
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, Undefined, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mtl_lora_cli.errors import did_you_mean

_MOST_FIELDS = 20  # named in an error


class NullPrintedError(ValueError):
    """A text would show a null as the word `None`, which no one means."""


def _printable(value: Any) -> Any:
    if value is None:
        raise NullPrintedError("a null would be printed")
    return value


def _refusing_null(text_filter: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, but null is an error; Jinja's own would go on with the word `None`."""

    @wraps(text_filter)
    def refuse(value: Any, *arguments: Any, **options: Any) -> Any:
        return text_filter(_printable(value), *arguments, **options)

    return refuse


class _Environment(ImmutableSandboxedEnvironment):
    def make_globals(self, d: MutableMapping[str, Any] | None) -> MutableMapping[str, Any]:
        """One plain dictionary for all templates; Jinja's ChainMap takes half the time of a row."""
        return self.globals


_environment = _Environment(
    undefined=StrictUndefined,
    finalize=_printable,
    autoescape=False,
    trim_blocks=True,  # a line that holds only {% … %} leaves no empty line behind
    lstrip_blocks=True,
)
del _environment.globals["lipsum"]
del _environment.filters["random"]
for _name in ("trim", "lower", "upper", "capitalize", "title"):
    _environment.filters[_name] = _refusing_null(_environment.filters[_name])


class Text:
    """A compiled Jinja text, `Review: {{ sentence }}`; call it with the row's variables.

    Raises:
        ValueError: it is not valid Jinja, or reads no variable and fails all the same.
    """

    def __init__(self, source: str) -> None:
        try:
            tree = _environment.parse(source)
            self.names = frozenset(meta.find_undeclared_variables(tree))
            self._template = _environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ValueError(_syntax(error, source)) from None
        self._constant: str | None = None
        if not self.names:
            try:
                self._constant = self._template.render()
            except Exception as error:  # whatever the sandbox, a filter or Python has against it
                raise ValueError(explain(error, {})) from None

    def __call__(self, variables: dict[str, Any]) -> str:
        return self._template.render(variables) if self._constant is None else self._constant


class Expression:
    """A compiled Jinja expression, `label - 1`; call it with the row's variables.

    Raises:
        ValueError: it is not valid Jinja.
    """

    def __init__(self, source: str) -> None:
        try:
            self._expression = _environment.compile_expression(source, undefined_to_none=False)
        except TemplateSyntaxError as error:
            raise ValueError(_syntax(error, source)) from None
        self._name = source if source.isidentifier() else ""

    def __call__(self, variables: dict[str, Any]) -> Any:
        if self._name in variables:  # `label` is most of all expressions, and Jinja is slow
            return variables[self._name]
        value = self._expression(variables)
        if isinstance(value, Undefined):
            str(value)  # says what is undefined, by raising
        return value


def explain(error: Exception, row: Mapping[str, Any]) -> str:
    """What went wrong in a text or expression, in the words of the row that it read."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, NullPrintedError):
        nulls = [str(name) for name, value in row.items() if value is None]
        return (
            f"{message}; null in this row: {', '.join(nulls) or 'no field'}; where a null is "
            "right, say what to print instead, as in {{ brand or 'unknown' }}"
        )
    missing = re.fullmatch(r"'(.+)' is undefined", message)
    if isinstance(error, UndefinedError) and missing:
        known = [str(name) for name in row]
        listed = ", ".join(known[:_MOST_FIELDS]) + (", …" if len(known) > _MOST_FIELDS else "")
        near = did_you_mean(missing[1], known)
        return f"the row has no field '{missing[1]}'; it has: {listed or 'no fields'}{near}"
    return message


def _syntax(error: TemplateSyntaxError, source: str) -> str:
    place = f" (line {error.lineno} of the text)" if "\n" in source.strip() else ""
    return f"not valid Jinja: {error.message}{place}"
