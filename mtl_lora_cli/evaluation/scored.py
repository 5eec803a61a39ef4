"""What candidates' log-probabilities say: the likeliest choice, or the expected value."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.errors import NoNumbersError
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.metrics import Outcome
from mtl_lora_cli.metrics.declare import read_by
from mtl_lora_cli.tasks.task import Task

NO_NUMBERS = "a sum left its dtype, or the adapter has grown without bound; a wider dtype (bfloat16, float32) may hold it"


def outcome_of(
    task: Task,
    examples: Examples,
    scores: Sequence[np.ndarray],
    requests: Sequence[Request] | None = None,
    normalisation: str | None = None,
) -> Outcome:
    """Predictions from log-probabilities: the likeliest choice, or the expected value.

    Args:
        task: whose examples they are.
        examples: its rows.
        scores: float64 [choices] of each.
        requests: how they were asked; the normalisation `token` needs them.
        normalisation: None: as the template says.
    """
    template = task.template
    how = normalisation or template.normalisation
    scores = normalised(scores, examples, requests, how)
    gold = np.asarray([example.gold for example in examples.examples])
    predicted = np.asarray([int(np.argmax(values)) for values in scores])
    likely = [probabilities(values) for values in scores]
    if template.scoring == "expectation":
        return Outcome(
            gold,
            predicted,
            probabilities=_padded(task, likely),
            gold_value=np.asarray([example.value for example in examples.examples]),
            predicted_value=np.asarray([expected_value(task, p) for p in likely]),
        )
    positive = template.positive_index
    two = all(len(values) == 2 for values in scores)
    return Outcome(
        gold,
        predicted,
        positive_score=np.asarray([p[positive] for p in likely]) if two else None,
        positive=positive,
        probabilities=_padded(task, likely),
    )


def _padded(task: Task, likely: Sequence[np.ndarray]) -> np.ndarray | None:
    """Probabilities [E, most choices], NaN behind a row's last, where one of the task's metrics reads them."""
    if "probabilities" not in read_by(task.template.metrics):
        return None
    padded = np.full((len(likely), max(map(len, likely), default=0)), np.nan)
    for row, values in zip(padded, likely, strict=True):
        row[: len(values)] = values
    return padded


def count_ties(scores: Sequence[np.ndarray]) -> int:
    """Examples of which two choices or more have the highest score, to a millionth of it."""
    tops = [float(values.max()) for values in scores]
    return sum(
        int((values >= top - 1e-6 * abs(top)).sum() > 1)
        for values, top in zip(scores, tops, strict=True)
    )


def probabilities(scores: np.ndarray) -> np.ndarray:
    """p_i = exp(s_i) / Σ_j exp(s_j) of one example's scores, float64 [choices]."""
    return np.exp(scores - np.logaddexp.reduce(scores))


def expected_value(task: Task, likely: np.ndarray) -> float:
    """Σ_i p_i · label_i, where labels are numbers."""
    return float(likely @ np.asarray([float(label) for label in task.template.labels or []]))


def have_numbers(scores: Sequence[np.ndarray]) -> bool:
    """Whether each example has a likeliest choice: none is NaN, and not all are impossible."""
    return all(bool(np.isfinite(values.max())) for values in scores)


def _require_numbers(scores: Sequence[np.ndarray], examples: Examples) -> None:
    wrong = [number for number, values in enumerate(scores) if not have_numbers([values])]
    if wrong:
        raise NoNumbersError(
            f"{examples.wheres[wrong[0]]}: the model finds no finite log-probability for an answer to this row "
            f"({len(wrong):,} of {len(scores):,} rows that were asked together): {NO_NUMBERS}"
        )


def normalised(
    scores: Sequence[np.ndarray],
    examples: Examples,
    requests: Sequence[Request] | None,
    normalisation: str,
) -> list[np.ndarray]:
    """Log-probabilities divided by a length: by 1, the choice's tokens, or its characters.

    Characters are those of the choice as it is rendered, as Python counts them and without the space
    before it: what lm-evaluation-harness divides by for `acc_norm`. An end that counts is as many tokens
    as it has, and as many characters.

    Args:
        scores: float64 [choices] of each example.
        examples: of the task.
        requests: how they were asked; `token` needs them. None: without any end.
        normalisation: one of `NORMALISATIONS`.

    Returns:
        float64 [choices] of each example.

    Raises:
        MtlLoraError: the model found no numbers for one.
    """
    _require_numbers(scores, examples)
    if normalisation == "sum":
        return list(scores)
    if normalisation == "character":
        ends = [0] * len(scores) if requests is None else [one.ends for one in requests]
        lengths = [
            [len(choice) + own for choice in example.choices]
            for example, own in zip(examples.examples, ends, strict=True)
        ]
    else:
        assert requests is not None, "a choice's tokens are known to its request only"
        lengths = [[max(1, len(choice)) for choice in request.choices] for request in requests]
    return [own / np.asarray(of) for own, of in zip(scores, lengths, strict=True)]
