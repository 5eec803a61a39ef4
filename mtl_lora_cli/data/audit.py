"""What is wrong with a task's rows without being an error: counted, and said before the first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.tasks.noticed import BLANK, FRACTION, LOST, WHOLE, WORD
from mtl_lora_cli.tasks.rendering import Example

_TELLING = 10  # rows that all have one answer, from which on that is said
MOST_ANSWERS = 1_000  # that are kept; a task with more has answers of its own in nearly every row
_LISTED = 10  # of them, in a line


class Rows(Protocol):
    """Rows that were rendered, counted (`seen.Seen`)."""

    @property
    def rows(self) -> int:
        """How many."""

    @property
    def answers(self) -> tuple[str, ...]:
        """The first different ones, at most `MOST_ANSWERS`."""


_BY_FIELD = (WHOLE, FRACTION)  # a number's neighbours say whether it is odd
_WHAT = {
    BLANK: "have an empty or blank field in their prompt",
    WORD: "print a word for what is missing, such as nan or None",
    LOST: "print U+FFFD, which stands for characters that were lost",
    WHOLE: "print a whole number as 3.0 (NAME | int writes 3)",
}


class Odd(NamedTuple):
    """Rows of one split that print a field which nobody may have meant so."""

    split: str
    found: int
    rows: int
    fields: str  # their names, the first row's first
    first: str  # file and line
    kind: str = BLANK  # see `oddity`

    @property
    def key(self) -> tuple[str, str]:
        """Its kind, and of a number its field: what is counted together."""
        return self.kind, self.fields if self.kind in _BY_FIELD else ""

    @property
    def name(self) -> str:
        """Of the split, as messages call it."""
        return "training" if self.split == "train" else self.split

    @property
    def field(self) -> str:
        """The first row's first."""
        return self.fields.split(", ")[0]

    def __str__(self) -> str:
        return (
            f"{self.found:,} of {self.rows:,} {self.name} rows {_WHAT[self.kind]} ({self.fields}), the "
            f"first is {self.first}"
        )


class Leak(NamedTuple):
    """Rows of a split that stand in training rows, too."""

    split: str
    found: int
    rows: int
    task: str = ""  # whose training rows; "": its own

    def __str__(self) -> str:
        where = f"the training rows of {self.task}" if self.task else "train"
        return f"{self.found:,} of {self.rows:,} {self.split} rows also stand in {where}"


@dataclass(frozen=True)
class Audit:
    """Counts over one task's training rows, and over what it is held against.

    Attributes:
        rows: training rows, after `max_examples`.
        repeated: rows whose prompt and answer stood before.
        contradictory: rows whose prompt also stands with another answer.
        leaks: held-out rows that stand in train, without regard to white space and case.
        held_out: rows of the split that evaluation will use.
        held_out_split: its name, or None where there is none.
        cut_prompts: prompts that lost their beginning for want of room.
        dropped: rows left out for want of room.
        turns: turns of conversations left out for want of room; then `cut_prompts` are conversations.
        odd: what is odd in prompts and free answers, by split and kind.
        constant: the answer that all held-out rows have, where training rows have others.
        only: the answer that all training rows have, each the only one of its row.
        unlearned: answers of held-out rows that no training row has, where all have the same choices.
        notes: what may have been read wrongly.
    """

    rows: int
    repeated: int = 0
    contradictory: int = 0
    leaks: tuple[Leak, ...] = ()
    held_out: int = 0
    held_out_split: str | None = None
    cut_prompts: int = 0
    dropped: int = 0
    turns: int = 0
    odd: tuple[Odd, ...] = ()
    constant: str | None = None
    only: str | None = None
    unlearned: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def findings(self, task: str) -> list[str]:
        """A line for each count that is not zero, the gravest first."""
        of = f"of {self.rows:,} training rows"
        counts = (
            (self.contradictory, f"{of} have a prompt that also stands with another answer"),
            (self.dropped, f"{of} are left out: longer than a row"),
            (self.cut_prompts, f"{of} lose {self._lost}: longer than a row"),
            (self.repeated, f"{of} repeat an earlier one"),
        )
        lines = [*self.notes, *map(str, self.leaks), *map(str, self.odd)]
        lines += [f"{count:,} {text}" for count, text in counts if count]
        if self.constant is not None:
            lines.append(
                f"all {self.held_out:,} {self.held_out_split} rows have the answer "
                f"'{self.constant:.60}', as where labels are kept back"
            )
        if self.only is not None:
            lines.append(f"all {self.rows:,} training rows have the answer '{self.only:.60}'")
        elif self.unlearned:
            listed = ", ".join(f"'{one:.60}'" for one in self.unlearned[:_LISTED])
            if len(self.unlearned) > _LISTED:
                listed += f", and {len(self.unlearned) - _LISTED:,} others"
            lines.append(
                f"{self.held_out_split} rows have an answer that no training row has: {listed}"
            )
        if self.held_out_split is None:
            lines.append("there is no test or validation split to evaluate it on")
        return [f"{task}: {line}" for line in lines]

    @property
    def _lost(self) -> str:
        if not self.turns:
            return "the beginning of their prompt"
        return f"their earliest turns ({self.turns:,} messages)"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "leaks": [leak._asdict() for leak in self.leaks],
            "odd": [one._asdict() for one in self.odd],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Audit:
        leaks = tuple(Leak(**leak) for leak in content["leaks"])
        odd = tuple(Odd(**one) for one in content["odd"])
        as_tuples = {name: tuple(content[name]) for name in ("unlearned", "notes")}
        return cls(**{**content, "leaks": leaks, "odd": odd, **as_tuples})


def audit(
    train: Rows,
    asked: np.ndarray,
    said: np.ndarray,
    held_out: Rows | None,
    held_out_split: str | None,
    *,
    leaks: Sequence[Leak],
    odd: Sequence[Odd],
    same_answers: bool = False,
    one_answer: bool = True,
    cut_prompts: int,
    dropped: int,
    turns: int = 0,
    notes: Sequence[str] = (),
) -> Audit:
    """Compare a task's training rows with each other, and put together what else was found.

    Args:
        train: the training rows, counted.
        asked, said: uint64 [rows], hashes of what each asks, 0 for nothing, and of that and its answer.
        held_out: the rows that evaluation will use.
        held_out_split: whose they are.
        same_answers: all rows have the same choices, each of which is to be learned, and `train` is all of them.
        one_answer: each row teaches one answer, and likewise.
        leaks, odd, cut_prompts, dropped, turns, notes: as of `Audit`.
    """
    pairs, firsts = np.unique(said, return_index=True)
    prompts, answers = np.unique(asked[firsts], return_counts=True)
    several = prompts[(answers > 1) & (prompts != 0)]  # plain text has no prompt
    return Audit(
        rows=train.rows,
        repeated=train.rows - len(pairs),
        contradictory=int(np.isin(asked, several).sum()) if len(several) else 0,
        leaks=tuple(leak for leak in leaks if leak.found),
        held_out=0 if held_out is None else held_out.rows,
        held_out_split=held_out_split,
        cut_prompts=cut_prompts,
        dropped=dropped,
        turns=turns,
        odd=tuple(_told(odd)),
        constant=None if held_out is None else _constant(train, held_out),
        only=_only(train) if one_answer else None,
        unlearned=_unlearned(train, held_out) if same_answers and held_out is not None else (),
        notes=tuple(dict.fromkeys(notes)),
    )


def odd_fields(split: str, examples: Sequence[Example], wheres: Sequence[str]) -> tuple[Odd, ...]:
    """What is odd in what a split prints, each kind once, and numbers by their field."""
    found: dict[tuple[str, str], list[int]] = {}
    names: dict[tuple[str, str], dict[str, None]] = {}
    for number, example in enumerate(examples):
        for kind, name in example.odd:
            key = (kind, name if kind in _BY_FIELD else "")
            names.setdefault(key, {})[name] = None
            if number not in found.setdefault(key, [])[-1:]:
                found[key].append(number)
    return tuple(
        Odd(split, len(own), len(examples), ", ".join(names[key]), wheres[own[0]], key[0])
        for key, own in found.items()
    )


def _told(odd: Sequence[Odd]) -> Iterator[Odd]:
    """Whole numbers with a point are none of a field's faults where other rows have fractions in it."""
    parts = {one.fields for one in odd if one.kind == FRACTION}
    for one in odd:
        if one.kind not in _BY_FIELD or (one.kind == WHOLE and one.fields not in parts):
            yield one


def require_no_blank(task: str, found: Sequence[Odd]) -> None:
    """Refuse rows with an empty field where their prompt means to print a text.

    Raises:
        UsageError: naming the first of them and its field.
    """
    for blank in (one for one in found if one.kind == BLANK):
        raise UsageError(
            f"{blank.first}: task '{task}': {blank.field}: is empty or blank, expected a text "
            f"({blank.found:,} of {blank.rows:,} {blank.name} rows have such a field); blank_fields: note "
            "goes on"
        )


def leaked(split: str, held_out: np.ndarray, train: Sequence[np.ndarray], task: str = "") -> Leak:
    """How many of a split's rows stand in training rows.

    Within a task two rows are the same by their prompts; rows of two tasks also by the texts that
    their prompts read.

    Args:
        split: its name.
        held_out: its rows' traces, uint64 [rows, 2].
        train: both columns of the training rows' traces, each sorted, none of them 0.
        task: whose training rows they are; "": the split's own task's.
    """
    hits = np.zeros(len(held_out), dtype=bool)
    for column in (0, 1) if task else (0,):
        hits |= among(held_out[:, column], train[column])
    return Leak(split, int(hits.sum()), len(held_out), task)


def among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which of some values are among sorted ones: of these only a few pages are looked at."""
    places = np.searchsorted(known, values)
    inside = places < len(known)
    found = np.zeros(len(values), dtype=bool)
    found[inside] = known[places[inside]] == values[inside]
    return found


def _constant(train: Rows, held_out: Rows) -> str | None:
    if held_out.rows < _TELLING or len(held_out.answers) > 1 or len(train.answers) < 2:
        return None
    return held_out.answers[0]


def _only(train: Rows) -> str | None:
    return train.answers[0] if train.rows >= _TELLING and len(train.answers) == 1 else None


def _unlearned(train: Rows, held_out: Rows) -> tuple[str, ...]:
    if max(len(train.answers), len(held_out.answers)) >= MOST_ANSWERS:
        return ()
    return tuple(answer for answer in held_out.answers if answer not in train.answers)
