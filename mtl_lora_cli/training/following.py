"""What follows the losses of a run while it learns: the shares of a dynamic mixture.

Whoever follows is told of every step when it has ended, and what follows from it holds three steps later:
a card works on one step, and the one after it is drawn already. So it is the same on any machine. All of it
is arithmetic of float64 on the CPU; the state is written into every checkpoint, and whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mtl_lora_cli.data.dynamic import DynamicMixture
from mtl_lora_cli.recipe.mixing import DynamicMixing
from mtl_lora_cli.training.observers import Seen

LAG = 3  # what a step's losses change holds from the third step after it on
_TOLD = 6  # tasks of which a line for a person speaks
_RATES = {"excess_loss": 1.0, "progress": 10.0}


class Following(Protocol):
    """Follows the losses.

    Attributes:
        name: of its state in a checkpoint.
    """

    name: str

    def observe(self, number: int, loss: Sequence[float], units: Sequence[int]) -> Seen | None:
        """A step has ended.

        Args:
            number: counted from 0.
            loss: Σ ℓ of each task over all processes.
            units: how many each of them has.

        Returns:
            What is to be written down.
        """

    def state(self) -> dict[str, Any]:
        """As JSON keeps it, to the last bit."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to such a state."""


def excess(losses: Sequence[float | None], reference: Sequence[float]) -> list[float | None]:
    """max(L_t − reference_t, 0) of each task; None of a task that nothing is known of.

    DoReMi's excess loss (Xie et al., arXiv 2305.10429), of tasks in the place of domains.
    """
    pairs = zip(losses, reference, strict=True)
    return [None if loss is None else max(loss - known, 0.0) for loss, known in pairs]


def progress(
    before: Sequence[float | None],
    losses: Sequence[float | None],
    change: Sequence[float | None],
    keep: float,
) -> list[float | None]:
    """Q_t ← keep · Q_t + (1 − keep) (L_t before − L_t), the first change as it is.

    The slope of the learning curve, smoothed (Matiisen et al., arXiv 1707.00183, its online algorithm).
    """
    found: list[float | None] = []
    for old, new, known in zip(before, losses, change, strict=True):
        if old is None or new is None:
            found.append(known)
        elif known is None:
            found.append(old - new)
        else:
            found.append(keep * known + (1 - keep) * (old - new))
    return found


def reweighted(
    shares: Sequence[float],
    signal: Sequence[float | None],
    rate: float,
    start: Sequence[float],
    floor: float,
) -> list[float]:
    """(1 − floor) · p_t exp(rate · x_t) / Σ p exp(rate · x) + floor · start_t.

    Args:
        shares: p.
        signal: x; where it is None the mean of the others stands.
        rate: η.
        start: shares of which a part stays.
        floor: that part.
    """
    known = [value for value in signal if value is not None]
    middle = math.fsum(known) / len(known) if known else 0.0
    filled = [middle if value is None else value for value in signal]
    most = max(filled)
    raw = [p * math.exp(rate * (x - most)) for p, x in zip(shares, filled, strict=True)]
    total = math.fsum(raw)
    if not total > 0:  # all that had a share is as nothing beside what has none
        return list(shares)
    return [
        (1 - floor) * value / total + floor * own for value, own in zip(raw, start, strict=True)
    ]


class FollowingShares:
    """Decides the shares of a dynamic mixture's blocks.

    `excess_loss`: the last shares times exp(η · excess); `progress`: the first ones times exp(η |Q|). Losses
    are means over the units that a task had since the last decision; a task that had none keeps its last.

    Args:
        mixture: whose blocks are decided.
        settings: the recipe's `mixing`.
        total: steps of the run.
    """

    name = "mixing"

    def __init__(self, mixture: DynamicMixture, settings: DynamicMixing, total: int) -> None:
        self._mixture, self._settings, self._total = mixture, settings, total
        count = len(mixture.names)
        self._sums, self._units = [0.0] * count, [0] * count
        self._losses: list[float | None] = [None] * count
        self._change: list[float | None] = [None] * count

    def observe(self, number: int, loss: Sequence[float], units: Sequence[int]) -> Seen | None:
        """See `Following`; before a block begins its shares are decided."""
        self._sums = [a + b for a, b in zip(self._sums, loss, strict=True)]
        self._units = [a + b for a, b in zip(self._units, units, strict=True)]
        first = number + LAG
        block, place = divmod(first, self._mixture.every)
        if place or first >= self._total:
            return None
        return self._decide(block, number)

    def _decide(self, block: int, number: int) -> Seen:
        settings, before = self._settings, self._losses
        self._losses = [
            total / count if count else old
            for total, count, old in zip(self._sums, self._units, before, strict=True)
        ]
        self._sums, self._units = [0.0] * len(before), [0] * len(before)
        start = self._mixture.start
        if settings.dynamic == "excess_loss":
            reference = [settings.reference.get(name, 0.0) for name in self._mixture.names]
            signal = excess(self._losses, reference)
            shares: Sequence[float] = self._mixture.block(block - 1).shares
        else:
            self._change = progress(before, self._losses, self._change, settings.keep)
            signal = [None if value is None else abs(value) for value in self._change]
            shares = start
        rate = settings.rate or _RATES[settings.dynamic]
        found = reweighted(shares, signal, rate, start, settings.floor)
        self._mixture.decide(block, found)
        return self._seen(block, number, found, signal)

    def _seen(
        self, block: int, number: int, shares: Sequence[float], signal: Sequence[float | None]
    ) -> Seen:
        names, first = self._mixture.names, block * self._mixture.every + 1
        event = {
            "event": "mixing",
            "step": number + 1,
            "from_step": first,
            "shares": dict(zip(names, shares, strict=True)),
            "loss": dict(zip(names, self._losses, strict=True)),
            self._settings.dynamic: dict(zip(names, signal, strict=True)),
        }
        return Seen(event, f"mixing from step {first}: {_told(names, shares)}")

    def state(self) -> dict[str, Any]:
        """See `Following`."""
        return {
            "blocks": self._mixture.state(),
            "sums": self._sums,
            "units": self._units,
            "losses": self._losses,
            "change": self._change,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Following`."""
        self._mixture.restore(state["blocks"])
        self._sums, self._units = list(state["sums"]), list(state["units"])
        self._losses, self._change = list(state["losses"]), list(state["change"])


def _told(names: Sequence[str], shares: Sequence[float]) -> str:
    """`a 40.0%, b 31.2%`: the largest first."""
    order = sorted(zip(shares, names, strict=True), key=lambda pair: -pair[0])
    more = f", {len(order) - _TOLD} more" if len(order) > _TOLD else ""
    return ", ".join(f"{name} {share:.1%}" for share, name in order[:_TOLD]) + more
