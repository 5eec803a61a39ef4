"""Large sets are asked window by window: of each only what the result needs is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.data.task_rows import MANY
from mtl_lora_cli.evaluation.answers import Answers, Progress, Questions, answer
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.evaluation.scored import normalised
from mtl_lora_cli.metrics import Outcome
from mtl_lora_cli.metrics.outcome import OF_EACH_ROW
from mtl_lora_cli.tasks.task import Task


def answered(
    opened: Run,
    tasks: Sequence[Task],
    held: Sequence[Examples],
    setting: Setting,
    advance: Progress,
    questions: Questions | None = None,
) -> Iterator[tuple[int, Examples, Answers]]:
    """The number of a task, some of its examples, and the answers to them; see `answer`.

    All tasks are asked together where none has many examples; otherwise one after the other, each in parts
    of `task_rows.MANY`.

    Args:
        questions: see `questions_ahead`.
    """
    sizes = [len(examples.examples) for examples in held]
    if max(sizes, default=0) <= MANY:
        found = answer(opened, tasks, held, setting, advance, keep=True, questions=questions)
        yield from zip(range(len(tasks)), held, found, strict=True)
        return
    shown = _Shown(advance, sum(sizes))
    for number, (task, examples) in enumerate(zip(tasks, held, strict=True)):
        for first in range(0, sizes[number], MANY):
            part = examples.part(first, min(first + MANY, sizes[number]))
            shown.begin(len(part.examples))
            (answers,) = answer(opened, [task], [part], setting, shown, keep=True)
            yield number, part, answers


def questions_ahead(
    opened: Run, tasks: Sequence[Task], held: Sequence[Examples], setting: Setting
) -> Questions | None:
    """What `answered` will ask, its trees built, before there is a model; None where that is done in parts.

    Raises:
        UsageError: as `requests_of`.
    """
    if max((len(examples.examples) for examples in held), default=0) > MANY:
        return None
    found = Questions.of(opened, tasks, held, setting)
    for request in found.together:
        request.tree  # noqa: B018 - it is kept
    return found


class _Shown:
    """How far all windows are, as far as it is known: how many answers others have, is not.

    Args:
        advance: called with (answers done, about how many in all).
        rows: of all windows.
    """

    def __init__(self, advance: Progress, rows: int) -> None:
        self._advance, self._left = advance, rows
        self._done, self._own, self._rows = 0, 0, 0

    def begin(self, rows: int) -> None:
        """The next window, of so many rows."""
        self._done += self._own
        self._left -= rows
        self._own, self._rows = 0, rows

    def __call__(self, done: int, total: int) -> None:
        """See `answer`."""
        self._own = total
        rest = round(self._left * total / self._rows)
        self._advance(self._done + done, self._done + total + rest)


@dataclass(frozen=True)
class Part:
    """What is kept of some answers to one task.

    Attributes:
        outcome, scores, unparsable, unreadable, ties, outcomes: as of `Answers`.
        truncated: prompts that were cut.
        ends: rows whose answers' ends counted.
        tokens: that were sent through the model.
        chances: float64 [rows], 1 / choices; nothing where there are none.
        as_harness: what is likeliest as lm-evaluation-harness asks, by its name for it; nothing where answers
            were generated.
    """

    outcome: Outcome
    scores: list[np.ndarray] | None
    outcomes: list[Outcome] | None
    unparsable: int
    unreadable: int
    ties: int
    truncated: int
    ends: int
    tokens: int
    chances: np.ndarray
    as_harness: dict[str, np.ndarray]

    @classmethod
    def of(cls, examples: Examples, own: Answers) -> Part:
        """Of the answers to these examples."""
        choices = [len(example.choices) for example in examples.examples]
        return cls(
            outcome=own.outcome,
            scores=own.scores,
            outcomes=own.outcomes,
            unparsable=own.unparsable,
            unreadable=own.unreadable,
            ties=own.ties,
            truncated=sum(request.truncated for request in own.requests),
            ends=sum(one.ends > 0 for one in own.requests),
            tokens=sum(request.cost for request in own.requests),
            chances=np.asarray([1 / count for count in choices if count]),
            as_harness=_likeliest(examples, own),
        )


def _likeliest(examples: Examples, own: Answers) -> dict[str, np.ndarray]:
    if own.open_scores is None:
        return {}
    found = {}
    for name, normalisation in (("acc", "sum"), ("acc_norm", "character")):
        scores = normalised(own.open_scores, examples, None, normalisation)
        found[name] = np.asarray([int(values.argmax()) for values in scores])
    return found


def together(parts: Sequence[Part]) -> Part:
    """Of answers behind each other."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    several = [one.outcomes for one in parts if one.outcomes is not None]
    scores = [one.scores for one in parts if one.scores is not None]
    return Part(
        outcome=_joined([one.outcome for one in parts]),
        scores=[row for some in scores for row in some] if scores else None,
        outcomes=[_joined(one) for one in zip(*several, strict=True)] if several else None,
        unparsable=sum(one.unparsable for one in parts),
        unreadable=sum(one.unreadable for one in parts),
        ties=sum(one.ties for one in parts),
        truncated=sum(one.truncated for one in parts),
        ends=sum(one.ends for one in parts),
        tokens=sum(one.tokens for one in parts),
        chances=np.concatenate([one.chances for one in parts]),
        as_harness={
            name: np.concatenate([one.as_harness[name] for one in parts])
            for name in first.as_harness
        },
    )


def _joined(outcomes: Sequence[Outcome]) -> Outcome:
    first = outcomes[0]
    names = [name for name in OF_EACH_ROW if getattr(first, name) is not None]
    every: dict[str, Any] = {
        name: _behind([getattr(one, name) for one in outcomes]) for name in names
    }
    return replace(first, **every)


def _behind(values: Sequence[np.ndarray]) -> np.ndarray:
    """Rows behind each other; shorter ones end with NaN."""
    if values[0].ndim == 2:
        width = max(one.shape[1] for one in values)
        values = [
            np.pad(one, ((0, 0), (0, width - one.shape[1])), constant_values=np.nan)
            for one in values
        ]
    return np.concatenate(values)
