"""How a written model compared with the run that it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mtl_lora_cli.export.questions import Questions, Scored
from mtl_lora_cli.metrics.intervals import Measured, measure
from mtl_lora_cli.tasks.task import Task

# Where so little is allowed, predictions must be equal, too. Where more is, candidates nearer to each
# other fall either way, and how many rows have such ones is the task's matter, not the writer's.
_PREDICTIONS_EQUAL = 1e-2


@dataclass(frozen=True)
class Distance:
    """A model beside the written one.

    Attributes:
        metrics: its scores.
        largest: largest difference of any candidate's log-probability from the written one's.
        equal: share of examples with the same prediction.
    """

    metrics: Mapping[str, Measured]
    largest: float
    equal: float


@dataclass(frozen=True)
class Unrounded:
    """The written model again, with what the dtype of its weights rounds taken back.

    Attributes:
        rows: so many were asked again: those on which it differs most from the reference.
        largest: difference of any candidate's log-probability there from the reference's.
        dtype: that rounds.
    """

    rows: int
    largest: float
    dtype: str


@dataclass(frozen=True)
class Comparison:
    """How a written model compared.

    Attributes:
        split, examples: which held-out rows, and how many of them.
        dtype: that all models computed in, whatever their weights are stored in.
        metrics: the written model's scores.
        models: label → another model; the reference first.
        allowed: what the reference's `largest` may be; of an unrounded model, what its own may be.
        titles: metrics as tables show them, where that is not their name.
        unrounded: where weights were rounded when they were written: what is judged in the place of the
            reference's `largest`, which is what rounding does.
        noise: where models were asked in 16 bits: largest difference by which one more rounding moves the run.
    """

    split: str
    examples: int
    dtype: str
    metrics: Mapping[str, Measured]
    models: Mapping[str, Distance]
    allowed: float
    titles: Mapping[str, str] = field(default_factory=dict)
    unrounded: Unrounded | None = None
    noise: float | None = None

    def title(self, metric: str) -> str:
        """A metric as tables show it."""
        return self.titles.get(metric, metric)

    @property
    def reference(self) -> Distance:
        """The model that the written one must equal."""
        return next(iter(self.models.values()))

    @property
    def largest(self) -> float:
        """Largest difference of a log-probability from the reference."""
        return self.reference.largest

    @property
    def equal(self) -> float:
        """Share of predictions that equal the reference's."""
        return self.reference.equal

    @property
    def holds(self) -> bool:
        """Whether the two agree within tolerance; NaN never does."""
        if self.unrounded is not None:
            return self.unrounded.largest <= self.allowed and not math.isnan(self.largest)
        return self.largest <= self.allowed and (self.equal == 1 or not self.predictions_count)

    @property
    def predictions_count(self) -> bool:
        """Whether the predictions have to be equal, too."""
        return self.unrounded is None and self.allowed <= _PREDICTIONS_EQUAL

    @property
    def asked(self) -> str:
        """What had to hold, in words."""
        if self.unrounded is not None:
            taken = f"with the rounding of its weights to {self.unrounded.dtype} taken back"
            return f"to {self.allowed:g} in log-probabilities {taken}"
        predictions = " and in all predictions" if self.predictions_count else ""
        return f"to {self.allowed:.3g} in log-probabilities{predictions}"

    @property
    def told(self) -> str:
        """What was found beside differences as they are, in words; nothing where nothing was."""
        if self.unrounded is not None:
            return (
                f"with the rounding of its weights to {self.unrounded.dtype} taken back {self.unrounded.largest:.2e} "
                f"on the {self.unrounded.rows} rows that differ most"
            )
        if self.noise is not None:
            return f"one more rounding of the run's embedding moves it by {self.noise:.2e}"
        return ""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Comparison:
        """The inverse of `dataclasses.asdict`."""
        models = {
            label: Distance(_metrics(found["metrics"]), found["largest"], found["equal"])
            for label, found in content["models"].items()
        }
        undone = content["unrounded"]
        return cls(
            **{
                **content,
                "metrics": _metrics(content["metrics"]),
                "models": models,
                "unrounded": None if undone is None else Unrounded(**undone),
            }
        )


def compared(
    questions: Questions,
    written: Scored,
    others: Mapping[str, Scored],
    allowed: float,
    *,
    unrounded: Unrounded | None = None,
    noise: float | None = None,
) -> Comparison:
    """Hold a written model's answers against others'.

    Args:
        questions: that all were asked.
        written: its answers.
        others: label → a model's; the first is the reference.
        allowed, unrounded, noise: as of `Comparison`.
    """
    return Comparison(
        split=questions.examples.split,
        examples=len(questions.requests),
        dtype=str(questions.dtype).removeprefix("torch."),
        metrics=_measured(questions.task, written),
        models={
            label: Distance(
                metrics=_measured(questions.task, other),
                largest=largest_difference(written.scores, other.scores),
                equal=_equal(written, other),
            )
            for label, other in others.items()
        },
        allowed=allowed,
        titles={n: questions.task.template.title(n) for n in questions.task.template.metrics},
        unrounded=unrounded,
        noise=noise,
    )


def _measured(task: Task, answers: Scored) -> dict[str, Measured]:
    if answers.outcome is None:
        return {}
    return {name: measure(name, answers.outcome) for name in task.template.metrics}


def _metrics(content: Mapping[str, Any]) -> dict[str, Measured]:
    return {name: Measured(**measured) for name, measured in content.items()}


def furthest(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], count: int) -> list[int]:
    """The rows that differ most, no number first."""
    gaps = np.array([np.abs(a - b).max(initial=0) for a, b in zip(ours, theirs, strict=True)])
    return [int(row) for row in np.argsort(-np.where(np.isnan(gaps), np.inf, gaps))[:count]]


def largest_difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Largest difference; NaN where a log-probability is no finite number."""
    if not all(np.isfinite(values).all() for values in [*ours, *theirs]):
        return float("nan")
    return max((float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _equal(ours: Scored, theirs: Scored) -> float:
    """Share of equal predictions; of likeliest candidates where there are no predictions."""
    if ours.outcome is not None and theirs.outcome is not None:
        return float(np.mean(ours.outcome.predicted == theirs.outcome.predicted))
    pairs = zip(ours.scores, theirs.scores, strict=True)
    return float(np.mean([a.argmax() == b.argmax() for a, b in pairs]))
