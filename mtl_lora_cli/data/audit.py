"""What is wrong with a task's rows without being an error: counted, and said before the first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.tasks.rendering import Example

_TELLING = 10  # held-out rows that all have one answer, from which on that is said


class Blank(NamedTuple):
    """Rows of one split that print a field which is empty or blank."""

    split: str
    found: int
    rows: int
    fields: str  # their names, the first row's first
    first: str  # file and line

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
            f"{self.found:,} of {self.rows:,} {self.name} rows have an empty or blank field in their "
            f"prompt ({self.fields}), the first is {self.first}"
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
        blank: rows whose prompt has a gap.
        constant: the answer that all held-out rows have, where training rows have others.
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
    blank: tuple[Blank, ...] = ()
    constant: str | None = None
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
        lines = [*self.notes, *map(str, self.leaks), *map(str, self.blank)]
        lines += [f"{count:,} {text}" for count, text in counts if count]
        if self.constant is not None:
            lines.append(
                f"all {self.held_out:,} {self.held_out_split} rows have the answer "
                f"'{self.constant:.60}', as where labels are kept back"
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
            "blank": [blank._asdict() for blank in self.blank],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Audit:
        leaks = tuple(Leak(**leak) for leak in content["leaks"])
        blank = tuple(Blank(**blank) for blank in content["blank"])
        notes = tuple(content["notes"])
        return cls(**{**content, "leaks": leaks, "blank": blank, "notes": notes})


def audit(
    train: Sequence[Example],
    held_out: Sequence[Example],
    held_out_split: str | None,
    *,
    leaks: Sequence[Leak],
    blank: Sequence[Blank | None],
    cut_prompts: int,
    dropped: int,
    turns: int = 0,
    notes: Sequence[str] = (),
) -> Audit:
    """Compare a task's training rows with each other, and put together what else was found."""
    pairs = Counter((_asked(example), example.answer) for example in train)
    answers = Counter(asked for asked, _ in pairs)
    return Audit(
        rows=len(train),
        repeated=len(train) - len(pairs),
        # Plain text has no prompt.
        contradictory=sum(answers[_asked(one)] > 1 for one in train if one.prompt),
        leaks=tuple(leak for leak in leaks if leak.found),
        held_out=len(held_out),
        held_out_split=held_out_split,
        cut_prompts=cut_prompts,
        dropped=dropped,
        turns=turns,
        blank=tuple(found for found in blank if found is not None),
        constant=_constant(train, held_out),
        notes=tuple(dict.fromkeys(notes)),
    )


def _asked(example: Example) -> tuple[Any, ...]:
    """What an example asks: its prompt, and which pictures it shows, whatever they are called."""
    return (example.prompt, *(picture.digest() for picture in example.images))


def blank_fields(split: str, examples: Sequence[Example], wheres: Sequence[str]) -> Blank | None:
    """The rows of a split whose prompt prints nothing where it means to print a field."""
    found = [number for number, example in enumerate(examples) if example.blank]
    if not found:
        return None
    names = dict.fromkeys(name for number in found for name in examples[number].blank)
    return Blank(split, len(found), len(examples), ", ".join(names), wheres[found[0]])


def require_no_blank(task: str, found: Sequence[Blank]) -> None:
    """Refuse rows with an empty field where their prompt means to print a text.

    Raises:
        UsageError: naming the first of them and its field.
    """
    for blank in found:
        raise UsageError(
            f"{blank.first}: task '{task}': {blank.field}: is empty or blank, expected a text "
            f"({blank.found:,} of {blank.rows:,} {blank.name} rows have such a field); blank_fields: note "
            "goes on"
        )


def leaked(split: str, held_out: np.ndarray, train: np.ndarray, task: str = "") -> Leak:
    """How many of a split's rows stand in training rows; both as `traces.traces` gives them.

    Within a task two rows are the same by their prompts; rows of two tasks also by the texts that
    their prompts read.
    """
    columns = [0, 1] if task else [0]
    hits = np.zeros(len(held_out), dtype=bool)
    for column in columns:
        hits |= np.isin(held_out[:, column], train[:, column]) & (held_out[:, column] != 0)
    return Leak(split, int(hits.sum()), len(held_out), task)


def _constant(train: Sequence[Example], held_out: Sequence[Example]) -> str | None:
    answers = {example.answer for example in held_out}
    if len(held_out) < _TELLING or len(answers) > 1 or len({e.answer for e in train}) < 2:
        return None
    return answers.pop()
