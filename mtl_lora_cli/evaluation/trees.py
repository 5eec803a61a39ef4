"""A prompt and its candidates as one tree, in which candidates share what they begin with.

A candidate's last token is only asked for, so that candidates of one token cost no token of their own: the
prompt's last position answers them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Tree:
    """A prompt and its candidates as one segment of n positions, in depth-first order.

    Every position from the prompt's last on answers something, what follows it in some candidate; but those
    that a candidate only passes through (`Request.passed`).

    Attributes:
        tokens, places: int32 [n], and their places in the text.
        reach: int32 [n], see `mtl_lora_cli.engine.segments`.
        owner: int32 [S], for each token of the candidates, one candidate behind the other, the
            position that answers it.
        targets: int32 [S], those tokens.
        lengths: int32 [C], how many of them each candidate has.
        asked: int32 [Q], the positions that answer something, ascending.
    """

    tokens: np.ndarray
    places: np.ndarray
    reach: np.ndarray
    owner: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    asked: np.ndarray

    @classmethod
    def build(
        cls, prompt: list[int], choices: list[list[int]], passed: Sequence[int] | None = None
    ) -> Tree:
        """A prompt's own tokens, and what its candidates add to any prompt."""
        start, own = len(prompt), branches_of(choices, passed)
        count = start + len(own.tokens)
        reach = np.full(count, count, dtype=np.int32)
        inside = own.reach >= 0
        reach[start:][inside] = own.reach[inside] + start
        if passed is None:
            asked = np.arange(start - 1, count, dtype=np.int32)
        else:
            asked = np.unique(own.owner + start).astype(np.int32)
        return cls(
            tokens=np.concatenate([np.asarray(prompt, dtype=np.int32), own.tokens]),
            places=np.concatenate([np.arange(start, dtype=np.int32), own.places + start]),
            reach=reach,
            owner=own.owner + start,
            targets=own.targets,
            lengths=own.lengths,
            asked=asked,
        )


class Branches(NamedTuple):
    """What candidates are behind any prompt, whose last position has the place −1; see `Tree`."""

    tokens: np.ndarray
    places: np.ndarray
    reach: np.ndarray  # −1: up to the end
    owner: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray


def branches_of(choices: Sequence[Sequence[int]], passed: Sequence[int] | None) -> Branches:
    """Of candidates; a task's are the same for most of its rows, and made once."""
    some = tuple(tuple(choice) for choice in choices)
    return _branches(some, None if passed is None else tuple(passed))


@lru_cache(maxsize=512)
def _branches(choices: Sequence[tuple[int, ...]], passed: Sequence[int] | None) -> Branches:
    """Sorted candidates that begin alike stand together, so each adds what the last one lacks."""
    tokens: list[int] = []
    places: list[int] = []
    reach: list[int] = []
    owners: list[list[int]] = [[] for _ in choices]
    path: list[int] = []  # positions of the last candidate's tokens, all but its own last one
    for number, inner, kept in _inner(choices):
        for position in path[kept:]:
            reach[position] = len(tokens)
        added = len(inner) - kept
        path = [*path[:kept], *range(len(tokens), len(tokens) + added)]
        tokens += inner[kept:]
        places += range(kept, len(inner))
        reach += [-1] * added
        owners[number] = [-1, *path][: len(choices[number])]
    if passed is not None:
        owners = [own[count:] for own, count in zip(owners, passed, strict=True)]
        choices = [own[count:] for own, count in zip(choices, passed, strict=True)]
    every = (
        tokens, places, reach, [place for some in owners for place in some],
        [token for some in choices for token in some], [len(some) for some in choices],
    )  # fmt: skip
    return Branches(*(np.asarray(one, dtype=np.int32) for one in every))


def _inner(choices: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """Candidates sorted, each with its tokens but the last, and how many of them the one before has, too."""
    before: tuple[int, ...] = ()
    for number in sorted(range(len(choices)), key=lambda number: choices[number]):
        inner = choices[number][:-1]
        same = zip(before, inner, strict=False)
        yield number, inner, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], same))
        before = inner
