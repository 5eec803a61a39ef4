"""Whether answers say anything of the rows: one answer to nearly all, or no better than a guess by shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtl_lora_cli.metrics.outcome import Array

NEARLY_ALL = 0.95  # share of the rows that one answer gets
FEWEST = 20  # rows; fewer may have one answer by chance
SURE = 2.0  # standard errors


@dataclass(frozen=True)
class OneAnswer:
    """An answer that nearly all rows get, though others are right of more than twice as many rows as get one.

    Attributes:
        choice: its index.
        share: of the rows that get it.
        right: share of the rows of which it is right.
    """

    choice: int
    share: float
    right: float


def one_answer(gold: Sequence[int] | Array, predicted: Sequence[int] | Array) -> OneAnswer | None:
    """The answer that nearly all rows get; None where answers differ, or where rows do as little.

    Args:
        gold: index of the right choice, [E].
        predicted: of the given one, [E]; −1: none, which is no answer.
    """
    answers = Counter(int(answer) for answer in predicted if answer >= 0)
    if len(predicted) < FEWEST or not answers:
        return None
    choice, count = answers.most_common(1)[0]
    share, right = count / len(predicted), float(np.mean(np.asarray(gold) == choice))
    if share < NEARLY_ALL or 1 - right <= 2 * (1 - share) or right == 1:
        return None
    return OneAnswer(choice, share, right)


def one_sided(found: Mapping[str, Any]) -> str:
    """A stored `OneAnswer`, its choice by name, in words."""
    return (
        f"'{found['choice']}' is the answer to {100 * found['share']:.0f} % of the rows, and right of "
        f"{100 * found['right']:.0f} %: nearly all rows get one answer"
    )


@dataclass(frozen=True)
class Guess:
    """How far answers are from a guess by shares.

    Attributes:
        loss: −log p of the right choice among a row's choices, in nats, in the mean over the rows.
        guess: the same of one who answers by how often each choice is right: −Σ_c q_c log q_c.
        better: whether `loss` lies below it by more than two standard errors of the rows' losses.
    """

    loss: float
    guess: float
    better: bool


def beside_a_guess(gold: Sequence[int] | Array, scores: Sequence[Array]) -> Guess:
    """Compare answers with a guess by the shares of the right choices.

    Args:
        gold: index of the right choice, [E].
        scores: log-probabilities of each row's choices, float64 [choices].
    """
    losses = np.asarray(
        [np.logaddexp.reduce(row) - row[right] for row, right in zip(scores, gold, strict=True)]
    )
    shares = np.unique(np.asarray(gold), return_counts=True)[1] / len(losses)
    guess = float(-(shares * np.log(shares)).sum())
    error = float(losses.std(ddof=1)) / len(losses) ** 0.5 if len(losses) > 1 else np.inf
    mean = float(losses.mean())
    return Guess(mean, guess, better=bool(mean + SURE * error < guess))


def no_better(
    gold: Sequence[int] | Array, predicted: Sequence[int] | Array, scores: Sequence[Array]
) -> Guess | None:
    """The comparison where answers cannot be told from a guess; None where they can, or rows are few.

    Neither the loss lies below that of a guess, nor the share of right answers above that of the answer that is right
    most often, by more than two standard errors. The second is asked, too: who learned rows by heart may be sure and
    wrong so often that only the loss is bad.

    Args:
        gold, scores: as of `beside_a_guess`.
        predicted: index of the given answer, [E].
    """
    rows = len(gold)
    if rows < FEWEST or not all(np.isfinite(row).all() for row in scores):
        return None
    found = beside_a_guess(gold, scores)
    right = float(np.mean(np.asarray(gold) == np.asarray(predicted)))
    most = float(np.unique(np.asarray(gold), return_counts=True)[1].max()) / rows
    above = right - SURE * (right * (1 - right) / rows) ** 0.5 > most
    return None if found.better or above or most == 1 else found


def guessed(found: Mapping[str, Any]) -> str:
    """A stored `Guess` of `no_better` in words."""
    return (
        "its answers cannot be told from a guess by how often each is right "
        f"({found['loss']:.3f} nats a row, the guess {found['guess']:.3f})"
    )
