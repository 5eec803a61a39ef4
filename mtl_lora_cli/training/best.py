"""Which of a run's looks was the best so far, and how long none was better."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Mark:
    """What one look says of the adapter as a whole.

    Attributes:
        of: what is measured, and on what; marks of different things are not compared.
        value: the mark; None where it is undefined, which is no better than anything.
        higher: whether more of it is better.
    """

    of: str
    value: float | None
    higher: bool


@dataclass(frozen=True)
class Best:
    """The best look so far.

    Attributes:
        of: of its mark.
        step: after which it was.
        value: of its mark.
        waited: looks since then, none of which was better.
    """

    of: str
    step: int
    value: float
    waited: int = 0

    def __str__(self) -> str:
        return f"step {self.step}, {self.of} {self.value:.4f}"

    @property
    def event(self) -> dict[str, Any]:
        """Its line of metrics.jsonl."""
        return {"event": "best", "step": self.step, "of": self.of, "value": self.value}


def best_after(best: Best | None, mark: Mark, step: int) -> Best | None:
    """The best look once there is another one; of equal ones the first.

    Args:
        best: before this look.
        mark: of this look.
        step: after which it is.
    """
    if best is not None and best.of != mark.of:
        best = None
    if mark.value is not None:
        sign = 1 if mark.higher else -1
        if best is None or sign * mark.value > sign * best.value:
            return Best(mark.of, step, mark.value)
    return None if best is None else replace(best, waited=best.waited + 1)
