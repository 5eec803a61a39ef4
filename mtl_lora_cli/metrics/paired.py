"""Two models on the same examples: what one is better by, and how sure that is.

Both are scored on the same resamples of the examples, so that what is hard for both leaves the
difference. One model's resamples are the other's, and one task's are the same beside any other task.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from mtl_lora_cli.metrics.declare import METRICS, find
from mtl_lora_cli.metrics.intervals import RESAMPLES, counted, mcnemar
from mtl_lora_cli.metrics.outcome import Outcome

_CHUNK = 250  # resamples whose weights are held at once


@dataclass(frozen=True)
class PairedDifference:
    """A metric less another model's on the same examples, with its 95 % interval.

    Attributes:
        difference, low, high: value, and percentiles of the paired bootstrap; no interval where all
            resamples agree on a difference: they say nothing of the next rows then.
        p: two-sided; that the two are equally good.
        test: `mcnemar` (exact) where answers are right or wrong, or there is no interval, else
            `bootstrap`.
    """

    difference: float
    low: float | None
    high: float | None
    p: float
    test: str


def paired(
    name: str,
    ours: Outcome,
    theirs: Outcome,
    task: str,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedDifference:
    """One metric of two models on the same examples.

    Args:
        name: of a metric that is defined for both.
        ours, theirs: what they answered; `ours` less `theirs` is told.
        task: whose examples they are; the draws are its own.
        resamples, seed: of the bootstrap.

    Raises:
        KeyError: an unknown metric.
        ValueError: the two do not cover the same number of examples.
    """
    metric = find(name)
    own, other = (
        sampled(name, one, task, resamples=resamples, seed=seed) for one in (ours, theirs)
    )
    found = own - other
    difference = metric.value(ours) - metric.value(theirs)
    low, high = percentiles(found, len(ours.gold))
    if not metric.proportion and low is not None:
        return PairedDifference(difference, low, high, bootstrap_p(found), "bootstrap")
    right = [(one.gold == one.predicted).tolist() for one in (ours, theirs)]
    return PairedDifference(difference, low, high, mcnemar(*right), "mcnemar")


def percentiles(differences: np.ndarray, examples: int) -> tuple[float | None, float | None]:
    """2.5 % and 97.5 % of resampled differences; None of one example's, or where all are one and not 0."""
    spread = float(np.ptp(differences))
    if examples < 2 or (spread == 0 and differences[0] != 0):
        return None, None
    low, high = np.quantile(differences, [0.025, 0.975]).tolist()
    return low, high


def sampled(
    name: str, outcome: Outcome, task: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """One metric on every resample of a task's examples, float64 [B]."""
    parts = example_weights(len(outcome.gold), resamples, task, seed)
    metric = find(name)
    return np.concatenate([metric.resampled(outcome, weights) for weights in parts])


def right_or_wrong(name: str) -> bool:
    """Whether a metric counts right answers: what McNemar's test is about."""
    return name in METRICS and METRICS[name].proportion


def example_weights(examples: int, resamples: int, task: str, seed: int) -> list[np.ndarray]:
    """Weights [≤ 250, E] in parts that make up B: as many examples, drawn with replacement.

    Each task has a generator of its own: another task beside it changes nothing.
    """
    word = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "little")
    generator = np.random.default_rng([seed, 1, word])
    parts = []
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        parts.append(counted(generator, examples, size).astype(np.float32))
    return parts


def bootstrap_p(differences: np.ndarray) -> float:
    """p = 2 min(#{d ≤ 0} + 1, #{d ≥ 0} + 1) / (B + 1), at most 1.

    Differences of rounding alone count as 0.
    """
    below = int((differences <= 1e-12).sum()) + 1
    above = int((differences >= -1e-12).sum()) + 1
    return min(1.0, 2 * min(below, above) / (len(differences) + 1))
