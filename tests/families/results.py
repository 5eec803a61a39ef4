"""What became of each model, as the lines of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .judge import Verdict
from .models import Tiny

ENOUGH = 3e-5


@dataclass(frozen=True)
class Result:
    """What became of a model.

    Attributes:
        model: which.
        verdict: how far it was from right; None where it was refused.
        refusal: the line that refused it.
    """

    model: Tiny
    verdict: Verdict | None
    refusal: str = ""

    @property
    def word(self) -> str:
        """`right`, `refused` or `WRONG`."""
        if self.verdict is None:
            return "refused"
        return "right" if self.verdict.worst <= ENOUGH else "WRONG"


def table(results: Sequence[Result]) -> list[str]:
    """A line for each result, and how many there are of each kind."""
    lines = []
    for result in results:
        name = f"{result.model.model_type:20} {result.model.variant:18} {result.word:8}"
        verdict = result.verdict
        how = result.refusal
        if verdict is not None:
            how = (
                f"{verdict.engine:26} forward {verdict.forward:.0e} "
                f"candidates {verdict.candidates:.0e} gradient {verdict.gradient:.0e}"
            )
        lines.append(f"{name} {how}")
    for word in ("right", "refused", "WRONG"):
        some = [result for result in results if result.word == word]
        types = {result.model.model_type for result in some}
        lines.append(f"{word}: {len(some)} models of {len(types)} types")
    return lines
