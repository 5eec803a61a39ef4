"""What is left of rows once they were rendered, to audit them: hashes, counts, and no text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from mtl_lora_cli.data.audit import MOST_ANSWERS, Odd, odd_fields
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
        answers: the first different ones, at most `MOST_ANSWERS`.
        odd: what is odd in the rows' prompts, each kind once.
        pictures: digests of those that are shown.
    """

    rows: int
    traces: np.ndarray
    asked: np.ndarray
    said: np.ndarray
    answers: tuple[str, ...]
    odd: tuple[Odd, ...]
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
        answers=_different(example.answer for example in examples),
        odd=odd_fields(split, examples, wheres),
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
        answers=_different([*one.answers, *other.answers]),
        odd=tuple(_both(one, other)),
        pictures=one.pictures | other.pictures,
    )


def _both(one: Seen, other: Seen) -> Iterator[Odd]:
    """What is odd in the prompts of all of them."""
    first, second = ({own.key: own for own in seen.odd} for seen in (one, other))
    for key in dict.fromkeys([*first, *second]):
        several = [own for own in (first.get(key), second.get(key)) if own is not None]
        names = dict.fromkeys(name for own in several for name in own.fields.split(", "))
        yield several[0]._replace(
            found=sum(own.found for own in several),
            rows=one.rows + other.rows,
            fields=", ".join(names),
        )


def _different(answers: Iterable[str]) -> tuple[str, ...]:
    return tuple(islice(dict.fromkeys(answers), MOST_ANSWERS))


def _hashes(example: Example) -> tuple[int, int]:
    """Of what an example asks, its prompt and which pictures it shows, and of that and its answer."""
    content = example.prompt.encode("utf-8", "surrogatepass")
    found = hashlib.blake2b(content, digest_size=8)
    for picture in example.images:
        found.update(b"\0" + picture.digest())
    asked = int.from_bytes(found.digest(), "little") if content else 0
    found.update(b"\0\0" + example.answer.encode("utf-8", "surrogatepass"))
    return asked, int.from_bytes(found.digest(), "little")
