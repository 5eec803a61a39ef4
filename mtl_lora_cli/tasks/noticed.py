"""What a prompt prints of a row though nobody may have meant it, and what a template says by a slip."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from mtl_lora_cli.tasks.jinja import Expression, Path, Text, spelled
from mtl_lora_cli.tasks.template import Each, Template

BLANK, WORD, LOST, WHOLE, FRACTION = "blank", "word", "lost", "whole", "fraction"

_UNSEEN = dict.fromkeys([0xAD, 0x180E, *range(0x200B, 0x2010), 0x2060, 0xFEFF])
_WORDS = frozenset({"nan", "NaN", "NaT", "<NA>", "None", "null", "NULL", "#N/A", "undefined"})
_MISSING = frozenset({"nan", "NaN", "NaT", "<NA>", "#N/A"})  # of these, what nobody answers
_LONGEST_NUMBER = 24
_DECIMAL = re.compile(r"-?[0-9]+\.(0|[0-9]+)")
_OF_JINJA = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", re.DOTALL)
_BRACES = re.compile(r"\{\s*(\w+)\s*\}")


def odd_answer(value: Any, *, plain: bool) -> str | None:
    """The same of a value that is printed as the right answer: it may be a word such as None, and an empty one is an
    error already."""
    kind = oddity(value, plain=plain)
    if kind == BLANK or (kind == WORD and str(value).strip() not in _MISSING):
        return None
    return kind


def oddity(value: Any, *, plain: bool) -> str | None:
    """What is odd about a value that is printed; None: nothing.

    Args:
        value: of a row.
        plain: whether it is printed as it stands; through a filter a number is written otherwise.

    Returns:
        BLANK: empty, or nothing that shows. WORD: what a program writes for a missing value. LOST: a
        character that stands for lost ones. WHOLE: a whole number with a point, as pandas makes it
        of integers beside an empty cell. FRACTION: a number with a point that needs it.
    """
    if type(value) is str:
        return _of_text(value, plain)
    if isinstance(value, list | tuple):
        return BLANK if all(map(_is_blank, value)) else None
    if plain and isinstance(value, float):
        return WHOLE if value.is_integer() else FRACTION
    return None


def _of_text(text: str, plain: bool) -> str | None:
    if _is_blank(text):
        return BLANK
    if len(text) > _LONGEST_NUMBER:
        return LOST if "\ufffd" in text else None
    if text.strip() in _WORDS:
        return WORD
    number = _DECIMAL.fullmatch(text) if plain and text[-1:].isdigit() else None
    if number is not None:
        return WHOLE if number[1] == "0" else FRACTION
    return LOST if "\ufffd" in text else None


def _is_blank(value: Any) -> bool:
    """Whether a text shows nothing: white space, and what only joins or parts the letters beside it."""
    if not isinstance(value, str):
        return False
    return not value.strip() or (not value.isascii() and not value.translate(_UNSEEN).strip())


def slips(template: Template, fields: Iterable[str]) -> Iterator[str]:
    """What a template says that it may not mean, a line each.

    Args:
        template: of texts.
        fields: what its rows have.
    """
    known = {*fields, *template.fields}
    texts = {"prompt": [template.prompt], "answer": [template.answer], "choices": _texts(template)}
    for key, several in texts.items():
        for name in dict.fromkeys(_in_single_braces(several)):
            if name in known:
                yield f"{key} shows {{{name}}} as it stands; the field is {{{{ {name} }}}}"
    given = _given_away(template)
    if given:
        yield f"the prompt prints {', '.join(given)}, which the right answer is read from"


def _texts(template: Template) -> list[str]:
    choices = template.choices
    if choices is None or isinstance(choices, Each):
        return []
    return list(choices.values() if isinstance(choices, dict) else choices)


def _in_single_braces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from _BRACES.findall(_OF_JINJA.sub(" ", text))


def _given_away(template: Template) -> list[str]:
    """The fields whose words are the right answer, where the prompt prints them all.

    An answer that is computed of what the prompt prints, as a sum is, is what the task asks for.
    """
    made_of = {name: Expression(text).joined for name, text in template.fields.items()}

    def sources(paths: Iterable[Path]) -> dict[Path, None]:
        found = (one for path in paths for one in made_of.get(str(path[0])) or (path,))
        return dict.fromkeys(
            path[1:] if path[0] == "row" and len(path) > 1 else path for path in found
        )

    label = "{{ " + (template.label or "none") + " }}"
    right = Text(template.answer if template.choices is None else label)
    if not right.kept.issuperset(right.paths):
        return []
    wanted = sources(right.paths)
    asked = Text(template.prompt)
    printed = sources(path for path in asked.printed if path in asked.kept)
    return [spelled(path) for path in wanted] if wanted and printed.keys() >= wanted.keys() else []
