"""What a model answered to the examples of one task, and what was right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

Array = np.ndarray
_BETWEEN = "\x1f"  # the control character that parts units


@dataclass(frozen=True)
class Outcome:
    """What a task's metrics are computed from.

    Attributes:
        gold: int [E], index of the right choice; 0 for a free answer.
        predicted: int [E], index of the chosen one; −1: none that is known, or a free answer that is wrong.
        gold_value, predicted_value: float64 [E], numbers, where the task is scored as an expectation.
        positive_score: float64 [E], probability of the positive class among two choices, where choices
            were scored.
        positive: index of the positive class.
        probabilities: float64 [E, most choices], of each row's choices, NaN behind a row's last one;
            kept where one of the task's metrics reads them, and choices were scored.
        references, answers: str [E], the right free answer and the given one; likewise. Of several right
            answers all, as `joined` puts them.
        tallies: float64 [E, K], of tasks whose answers are maps what was counted on each image; see
            `tallies.py`. `gold` and `predicted` are 0 then.
    """

    gold: Array
    predicted: Array
    gold_value: Array | None = None
    predicted_value: Array | None = None
    positive_score: Array | None = None
    positive: int = 1
    probabilities: Array | None = None
    references: Array | None = None
    answers: Array | None = None
    tallies: Array | None = None

    def take(self, numbers: Array) -> Outcome:
        """Some of the examples, with repetition."""
        parts = {name: getattr(self, name) for name in OF_EACH_ROW}
        return replace(
            self, **{name: part[numbers] for name, part in parts.items() if part is not None}
        )


def joined(answers: Sequence[str]) -> str:
    """Right answers of one row as one text."""
    return _BETWEEN.join(answers)


def several(reference: str) -> list[str]:
    """The right answers of one row; the inverse of `joined`."""
    return reference.split(_BETWEEN)


OF_EACH_ROW = tuple(field.name for field in fields(Outcome) if field.name != "positive")
