"""What a generated answer says: where it ends, what counts in it, and which choice it names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mtl_lora_cli.tasks.template import Template

# What makes another word or number of a choice before it: `no-one`, `can't`, `yes/no`, `C++`, `1.5`.
_GOES_ON = re.compile(r"[-'’\u2010\u2011/]\w|[+#]|(?<=\d)[.,:]\d")


@dataclass(frozen=True)
class Reading:
    """How a task's generated answers end, and what is read in them.

    Attributes:
        stop: texts at which an answer ends; white space at its beginning does not count.
        extract: a regular expression of what counts in an answer; None: the answer as a whole.
    """

    stop: tuple[str, ...] = ()
    extract: str | None = None

    def complete(self, text: str) -> bool:
        """Whether an answer has come to one of the texts that end it."""
        return any(stop in text.lstrip() for stop in self.stop)

    def answer(self, text: str) -> str:
        """The answer in a generated text."""
        text = text.strip()
        for stop in self.stop:
            text = text.split(stop)[0]
        return text.strip()

    def found(self, text: str) -> list[str]:
        """What the expression finds, in order: its group, or the whole match where it has none."""
        return re.findall(self.extract, text) if self.extract is not None else [text]

    def choice(self, text: str, choices: Sequence[str]) -> int:
        """The index of the choice that a generated text names, −1 where it names none.

        With `extract`: of what is found in the answer, the first that is found in a choice, too.
        Without: the choice that the answer begins with, as whole words; case does not count.
        """
        answer = self.answer(text)
        if self.extract is not None:
            known = {self.found(choice)[0]: number for number, choice in enumerate(choices)}
            return next((known[part] for part in self.found(answer) if part in known), -1)
        fitting = [n for n, choice in enumerate(choices) if begins(choice, answer)]
        return max(fitting, key=lambda number: len(choices[number]), default=-1)

    def equal(self, text: str, expected: str) -> bool | None:
        """Whether a generated text is the expected free answer; None where nothing is found in it."""
        found = self.found(self.answer(text))
        return found[:1] == self.found(expected)[:1] if found else None

    def unreadable(self, expected: str) -> str | None:
        """Why an answer is not read as itself, even where it is generated word for word."""
        if self.equal(expected, expected):
            return None
        for stop in self.stop:
            if stop in expected:
                return f"generate.stop {stop!r} stands in the answer {_short(expected)} and ends it"
        return f"generate.extract '{self.extract}' finds nothing in the answer {_short(expected)}"

    def conflict(self, choices: Sequence[str]) -> str | None:
        """Why choices cannot all be told from each other when they are generated."""
        for choice in choices:
            why = self.unreadable(choice)
            if why is not None:
                return why
        if self.extract is None:
            pair = prefix_conflict(choices)
            if pair is None:
                return None
            begun = f"the choice '{pair[0]}' begins the choice '{pair[1]}'"
            return f"{begun}, so a generated answer cannot tell them apart"
        known: dict[str, str] = {}
        for choice in choices:
            part = self.found(choice)[0]
            if part in known:
                return (
                    f"generate.extract '{self.extract}' finds '{part}' in '{known[part]}' "
                    f"and in '{choice}', so a generated answer cannot tell them apart"
                )
            known[part] = choice
        return None


def reading_of(template: Template) -> Reading:
    """How a task's generated answers are read."""
    own = template.generate
    stop = own.stop
    if stop is None:  # choices are named in the first line
        stop = ["\n"] if template.choices is not None and own.extract is None else []
    return Reading(tuple(stop), own.extract)


def begins(choice: str, text: str) -> bool:
    """Whether a text begins with a choice as whole words, without regard to case.

    `no` does not begin `nothing`, `no-one` or `nó`, nor does `1` begin `10` or `1.5`.
    """
    choice, text = _folded(choice), _folded(text)
    if not text.startswith(choice):
        return False
    if not choice or not _of_a_word(choice[-1]):
        return True
    behind = text[len(choice) : len(choice) + 1]
    return not (_of_a_word(behind) or _GOES_ON.match(text, len(choice)))


def prefix_conflict(choices: Sequence[str]) -> tuple[str, str] | None:
    """Two choices of which the first begins the second, if there are such; case does not count.

    Reading a generated answer, `not` cannot be told from the beginning of `not sure`.
    """
    ordered = sorted(choices, key=_folded)
    for shorter, longer in pairwise(ordered):
        if _folded(longer).startswith(_folded(shorter)):
            return shorter, longer
    return None


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def _of_a_word(character: str) -> bool:
    """Letters, digits, `_`, and the marks that belong to a letter before them."""
    return bool(character) and (
        character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"
    )


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else shown[:57] + "..."
