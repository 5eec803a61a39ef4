"""Metrics of rows that were answered several times: their mean over the answers, and pass@k.

With N answers to each row, of which c are right, the chance that one of k that are picked among them is
right is

    pass@k = 1 − C(N − c, k) / C(N, k)

(Chen et al. 2021, arXiv 2107.03374), in the mean over the rows; pass@N is the best of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

from mtl_lora_cli.metrics.declare import find
from mtl_lora_cli.metrics.intervals import RESAMPLES, Measured, counted
from mtl_lora_cli.metrics.outcome import Array, Outcome


def measure_mean(name: str, outcomes: Sequence[Outcome], seed: int = 0) -> Measured:
    """The mean of a metric over the first answers of all rows, the second ones, and so on.

    Its 95 % interval is a percentile bootstrap over rows: a row is drawn with all its answers.

    Raises:
        KeyError: an unknown metric.
    """
    metric = find(name)
    why = next(filter(None, map(metric.undefined, outcomes)), None)
    if why:
        return Measured(None, why=why)
    value = float(np.mean([metric.value(outcome) for outcome in outcomes]))
    generator = np.random.default_rng(seed)
    samples = []
    for _ in range(RESAMPLES // 100):
        weights = counted(generator, len(outcomes[0].gold), 100)
        samples.append(np.mean([metric.raw(outcome, weights) for outcome in outcomes], axis=0))
    return Measured(value, *_percentiles(np.concatenate(samples)))


def pass_at(outcomes: Sequence[Outcome], seed: int = 0) -> dict[int, Measured]:
    """pass@k for k = 1, 2, 4, … and N, with 95 % intervals by a percentile bootstrap over rows."""
    right = np.sum([outcome.gold == outcome.predicted for outcome in outcomes], axis=0)
    count, rows = len(outcomes), len(right)
    weights = counted(np.random.default_rng(seed), rows, RESAMPLES)
    powers = [1 << n for n in range(count.bit_length()) if 1 << n < count]
    found = {}
    for k in [*powers, count]:
        each = np.asarray([1 - comb(count - int(c), k) / comb(count, k) for c in right])
        found[k] = Measured(float(each.mean()), *_percentiles(weights @ each / rows))
    return found


def _percentiles(samples: Array) -> tuple[float, float] | tuple[None, None]:
    """None where all resamples agree: they say nothing of the next rows."""
    defined = samples[~np.isnan(samples)]
    if not defined.size or np.ptp(defined) == 0:
        return None, None
    low, high = np.quantile(defined, [0.025, 0.975]).tolist()
    return low, high
