"""What is left of rows once they were rendered, to audit them: hashes, counts, and no text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mtl_lora_cli.data.audit import Blank, blank_fields
from mtl_lora_cli.data.traces import traces
from mtl_lora_cli.tasks.rendering import Example


@dataclass(frozen=True)
class Seen:
    """Rows of one split, some or all of them.

    Attributes:
        rows: how many.
        traces: uint64 [rows, 2], see `traces`.
        asked: uint64 [rows], of what each asks, to the letter; 0 where it has no prompt.
        said: uint64 [rows], of that and its answer.
        answers: the first answer, and the first other one.
        blank: rows whose prompt has a gap.
        pictures: digests of those that are shown.
    """

    rows: int
    traces: np.ndarray
    asked: np.ndarray
    said: np.ndarray
    answers: tuple[str, ...]
    blank: Blank | None
    pictures: frozenset[bytes]


def seen_of(split: str, examples: Sequence[Example], wheres: Sequence[str]) -> Seen:
    """Of rendered rows."""
    pairs = [_hashes(example) for example in examples]
    hashes = np.array(pairs, dtype=np.uint64).reshape(-1, 2)
    return Seen(
        rows=len(examples),
        traces=traces(examples),
        asked=hashes[:, 0],
        said=hashes[:, 1],
        answers=_first_two([example.answer for example in examples]),
        blank=blank_fields(split, examples, wheres),
        pictures=frozenset(one.digest() for example in examples for one in example.images),
    )


def together(several: Sequence[Seen]) -> Seen:
    """Of rows behind each other."""
    found = several[0]
    for one in several[1:]:
        found = counted(found, one)
    return replace(
        found,
        traces=np.concatenate([one.traces for one in several]),
        asked=np.concatenate([one.asked for one in several]),
        said=np.concatenate([one.said for one in several]),
    )


def counted(one: Seen, other: Seen) -> Seen:
    """Of both, but for the hashes, which are those of the first."""
    return replace(
        one,
        rows=one.rows + other.rows,
        answers=_first_two([*one.answers, *other.answers]),
        blank=_both(one, other),
        pictures=one.pictures | other.pictures,
    )


def _both(one: Seen, other: Seen) -> Blank | None:
    """Rows with a gap among all of them."""
    if one.blank is None or other.blank is None:
        found = one.blank or other.blank
        return None if found is None else found._replace(rows=one.rows + other.rows)
    names = dict.fromkeys([*one.blank.fields.split(", "), *other.blank.fields.split(", ")])
    return one.blank._replace(
        found=one.blank.found + other.blank.found,
        rows=one.rows + other.rows,
        fields=", ".join(names),
    )


def _first_two(answers: Sequence[str]) -> tuple[str, ...]:
    if not answers:
        return ()
    other = next((answer for answer in answers if answer != answers[0]), None)
    return (answers[0],) if other is None else (answers[0], other)


def _hashes(example: Example) -> tuple[int, int]:
    """Of what an example asks, its prompt and which pictures it shows, and of that and its answer."""
    content = example.prompt.encode("utf-8", "surrogatepass")
    found = hashlib.blake2b(content, digest_size=8)
    for picture in example.images:
        found.update(b"\0" + picture.digest())
    asked = int.from_bytes(found.digest(), "little") if content else 0
    found.update(b"\0\0" + example.answer.encode("utf-8", "surrogatepass"))
    return asked, int.from_bytes(found.digest(), "little")
