"""Examples laid behind each other, or, where they share what they begin with, in trees.

In a tree the examples of a task stand in the order of their tokens, and each adds to the one before what
that one lacks: depth first, as `engine/segments.py` wants it. A position of several examples is computed once,
sees what it sees in each of them alone, and its gradient is the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mtl_lora_cli.data.beginnings import common, key_of, shared


@dataclass(frozen=True)
class Laid:
    """N positions of some examples.

    Attributes:
        tokens: [N].
        places: int64 [N], each position's place in its example.
        tasks: int64 [N].
        lengths: positions of each segment, an example or a tree.
        reach: int32 [N], of trees; see `mtl_lora_cli.engine.segments`.
        paths: of each example, in the given order, the positions of its tokens.
    """

    tokens: np.ndarray
    places: np.ndarray
    tasks: np.ndarray
    lengths: list[int]
    reach: np.ndarray | None
    paths: list[np.ndarray]


def behind_each_other(tasks: Sequence[int], inputs: Sequence[np.ndarray]) -> Laid:
    """Each example a segment.

    Args:
        tasks: of each example.
        inputs: its tokens that take a position.
    """
    lengths = [len(tokens) for tokens in inputs]
    starts = np.cumsum([0, *lengths]).tolist()
    return Laid(
        tokens=np.concatenate(inputs),
        places=np.concatenate([np.arange(length) for length in lengths]),
        tasks=np.repeat(tasks, lengths),
        lengths=lengths,
        reach=None,
        paths=[
            np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)
        ],
    )


def in_trees(rows: Sequence[tuple[Sequence[int], Sequence[np.ndarray]]]) -> Laid:
    """The examples of each row in trees; rows share nothing with each other.

    Args:
        rows: of each the tasks and the inputs of its examples, as above.
    """
    made = [_forest(tasks, inputs) for tasks, inputs in rows]
    starts = np.cumsum([0, *(len(one.tokens) for one in made)]).tolist()
    placed = list(zip(made, starts, strict=False))
    return Laid(
        tokens=np.concatenate([one.tokens for one in made]),
        places=np.concatenate([one.places for one in made]),
        tasks=np.concatenate([one.tasks for one in made]),
        lengths=[length for one in made for length in one.lengths],
        reach=np.concatenate([one.reach + start for one, start in placed if one.reach is not None]),
        paths=[path + start for one, start in placed for path in one.paths],
    )


def _forest(tasks: Sequence[int], inputs: Sequence[np.ndarray]) -> Laid:
    order = sorted(range(len(inputs)), key=lambda number: (tasks[number], key_of(inputs[number])))
    kept = _kept(order, tasks, inputs)
    added = [len(inputs[number]) - own for number, own in zip(order, kept, strict=True)]
    starts = np.cumsum([0, *added]).tolist()
    reach = np.full(starts[-1], -1, dtype=np.int32)
    paths: list[np.ndarray] = [np.arange(0)] * len(inputs)
    roots, path = [], np.arange(0)
    for number, own, start, count in zip(order, kept, starts, added, strict=False):
        reach[path[own:]] = start
        if own == 0:
            roots.append(start)
        path = np.concatenate([path[:own], np.arange(start, start + count)])
        paths[number] = path
    reach[path] = starts[-1]
    return Laid(
        tokens=np.concatenate([inputs[n][own:] for n, own in zip(order, kept, strict=True)]),
        places=np.concatenate(
            [np.arange(own, len(inputs[n])) for n, own in zip(order, kept, strict=True)]
        ),
        tasks=np.repeat([tasks[number] for number in order], added),
        lengths=np.diff([*roots, starts[-1]]).tolist(),
        reach=reach,
        paths=paths,
    )


def _kept(order: Sequence[int], tasks: Sequence[int], inputs: Sequence[np.ndarray]) -> list[int]:
    """Positions that each has from the one before it."""
    found = [0]
    for one, other in pairwise(order):
        alike = common(inputs[one], inputs[other]) if tasks[one] == tasks[other] else 0
        found.append(shared(alike))
    return found
