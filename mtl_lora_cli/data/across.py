"""Held-out rows of one task that stand in the training rows of another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mtl_lora_cli.data.audit import Audit, among, leaked
from mtl_lora_cli.data.cache import Traces


def across(tasks: Sequence[str], audits: Sequence[Audit], seen: Sequence[Traces]) -> list[Audit]:
    """The audits with the leaks between tasks.

    Args:
        tasks: their names.
        audits: of each.
        seen: what is known of its rows.
    """
    leaks: list[list[tuple[int, int]]] = [[] for _ in tasks]  # of each: held-out split, other task
    if len(tasks) > 1:
        held, owners = _held_out(seen)
        for other, rows in enumerate(seen):
            for task, split in _owning(held, owners, rows.train):
                if task != other:
                    leaks[task].append((split, other))
    found = []
    for task, own in enumerate(audits):
        splits = sorted(seen[task].held)
        more = [
            leaked(splits[split], seen[task].held[splits[split]], seen[other].train, tasks[other])
            for split, other in sorted(leaks[task])
        ]
        found.append(replace(own, leaks=own.leaks + tuple(leak for leak in more if leak.found)))
    return found


def _held_out(seen: Sequence[Traces]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """By column all held-out rows' numbers, sorted, and whose each is: 2 t + split."""
    rows, whose = [np.empty((0, 2), np.uint64)], [np.empty(0, np.int64)]
    for task, own in enumerate(seen):
        for split, name in enumerate(sorted(own.held)):
            rows.append(own.held[name])
            whose.append(np.full(len(own.held[name]), 2 * task + split))
    every, owners = np.concatenate(rows), np.concatenate(whose)
    orders = [np.argsort(every[:, column], kind="stable") for column in (0, 1)]
    return [every[order, n] for n, order in enumerate(orders)], [owners[o] for o in orders]


def _owning(
    held: Sequence[np.ndarray], owners: Sequence[np.ndarray], train: Sequence[np.ndarray]
) -> list[tuple[int, int]]:
    """The tasks and splits of which a row may be one of these training rows."""
    found: set[int] = set()
    for values, whose, known in zip(held, owners, train, strict=True):
        if len(known) < len(values):  # the fewer are looked for among the others
            starts = np.searchsorted(values, known)
            ends = np.searchsorted(values, known, "right")
            hit = [whose[a:b] for a, b in zip(starts, ends, strict=True) if b > a]
        else:
            hit = [whose[among(values, known)]]
        found.update(np.unique(np.concatenate([np.empty(0, np.int64), *hit])).tolist())
    return [divmod(number, 2) for number in sorted(found)]
