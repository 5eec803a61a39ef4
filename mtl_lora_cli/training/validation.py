"""Each task's loss and metric on held-out examples while the run learns: who gains, and who loses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.data.encoded import EncodedSplit, encode_split
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.data.prepare import read_examples
from mtl_lora_cli.evaluation.choices import ask, fill_passes
from mtl_lora_cli.evaluation.protocols import CHOICES, Setting
from mtl_lora_cli.evaluation.requests import Request, build_requests, require_different
from mtl_lora_cli.evaluation.scored import outcome_of
from mtl_lora_cli.machine import threads
from mtl_lora_cli.machine.processes import ALONE, Processes
from mtl_lora_cli.metrics import Outcome
from mtl_lora_cli.metrics.declare import direction, find
from mtl_lora_cli.metrics.guessing import beside_a_guess, one_answer
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.host import Batch, Dataset, Host
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.recipe.training import Training
from mtl_lora_cli.tasks.maps import MAPS
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.training.best import Mark
from mtl_lora_cli.training.map_looks import map_values
from mtl_lora_cli.training.observers import Seen, pass_length, undisturbed

SPLIT = "validation"  # never test: that one is for the end; never train: that one is learned
_TOLD = 20  # tasks in a line for a person
MACRO = "macro"  # names the average over tasks
LOOKED_AT = 0  # not the run's seed: runs that differ in it are measured on the same examples


@dataclass(frozen=True)
class TaskLook:
    """What a task's choices come to.

    Attributes:
        value: of the metric; None where it is undefined.
        guess: `metrics.guessing.Guess` as a dictionary; None where a log-probability is no number.
        one_answer: `metrics.guessing.OneAnswer` with the choice's name; None where answers differ.
    """

    value: float | None
    guess: dict[str, Any] | None = None
    one_answer: dict[str, Any] | None = None


@dataclass(frozen=True)
class HeldOut:
    """Some examples of one task's validation split.

    Attributes:
        task: whose they are.
        split: as training has them, for the loss; empty where there is no such split.
        examples: as they were rendered; None where there is no such split.
        requests: as evaluation asks them; none where there is no metric.
        metric: the first of the task's metrics; None where the recipe wants none, where answers are
            free texts, and where these examples leave it undefined even for one who knows all answers.
    """

    task: Task
    split: Sized
    examples: Examples | None = None
    requests: Sequence[Request] = ()
    metric: str | None = None

    @property
    def title(self) -> str:
        """The metric as it is shown."""
        assert self.metric is not None
        return self.task.template.title(self.metric)

    def measured(self, scores: Sequence[np.ndarray]) -> TaskLook:
        """What log-probabilities, float64 [choices] of each example, come to."""
        assert self.metric is not None
        if not all(np.isfinite(values).all() for values in scores):
            return TaskLook(None)
        outcome, metric = self.outcome(scores), find(self.metric)
        value = None if metric.undefined(outcome) else metric.value(outcome)
        one = one_answer(outcome.gold, outcome.predicted)
        name = None if one is None else self.task.template.choice_name(one.choice)
        return TaskLook(
            value,
            guess=asdict(beside_a_guess(outcome.gold, scores)),
            one_answer=None if one is None else {**asdict(one), "choice": name},
        )

    def outcome(self, scores: Sequence[np.ndarray]) -> Outcome:
        """What the log-probabilities answer."""
        assert self.examples is not None
        return outcome_of(self.task, self.examples, scores, self.requests)


def encode_validation(
    tasks: Sequence[Task], recipe: Recipe, tokenizer: Any, longest: int
) -> list[HeldOut]:
    """Some examples of each task's validation split, drawn once and for all runs.

    Too long ones are treated as evaluation does (a prompt loses its beginning); for the loss they
    are dropped where the training drops its own.

    Args:
        tasks: bound tasks.
        recipe: its `training` says how many examples, and how long a row is.
        tokenizer: the base model's.
        longest: positions that the base model knows.

    Returns:
        The examples of each task; none of a task that has no validation split.

    Raises:
        UsageError: a file, a row or a label is wrong.
    """
    training = recipe.training
    assert training.validation is not None
    encoder = Encoder.of(tokenizer, recipe)
    limit = min(training.row_length, longest)
    held = []
    for task in tasks:
        found = read_examples(task, SPLIT, at_most=training.validation.examples, seed=LOOKED_AT)
        if found is None:
            held.append(HeldOut(task, _nothing()))
            continue
        marked = encoder.control_tokens.mark(task, found).examples
        split = encode_split(
            marked,
            found.wheres,
            encoder,
            task=task.name,
            limit=limit,
            on_overflow="drop" if training.on_overflow == "drop" else "truncate_prompt",
        )
        one = HeldOut(task, split, found)
        if training.validation.metric and Setting().protocol_of(task) == CHOICES:
            requests = build_requests(marked, task.id, encoder, limit)
            require_different(task, found, requests)
            one = _with_metric(one, requests)
        held.append(one)
    return held


def _nothing() -> EncodedSplit:
    none = np.empty(0, dtype=np.int32)
    return EncodedSplit(none, np.zeros(1, dtype=np.int64), none, dropped=0, truncated=0, rows=0)


def _with_metric(held: HeldOut, requests: Sequence[Request]) -> HeldOut:
    """To be asked, too, unless its metric would be undefined for whoever knows all answers."""
    assert held.examples is not None
    name = held.task.template.metrics[0]
    asked = HeldOut(held.task, held.split, held.examples, requests, name)
    right = [np.full(len(one.choices), -1e3) for one in held.examples.examples]
    for values, one in zip(right, held.examples.examples, strict=True):
        values[one.gold] = 0.0
    return held if find(name).undefined(asked.outcome(right)) else asked


class Validation:
    """Every so many steps, at the end, and before the first one where that is asked for: each task's mean loss a unit (a supervised token, of text), and its metric.

    Without dropout, at the parameters that the step leaves. Processes share the examples, unless they
    must run the same passes; what the first one finds holds for all.

    Args:
        host: the model with the adapter injected.
        adapter: what is trained.
        held: of each task, such as `encode_validation` gives.
        dataset: the same examples, to be collated.
        settings: the recipe's `training`, with `validation`.
        total_steps: of the whole run.
        processes: this one among those of the run.
        same_passes: each of them computes all.
    """

    before_update = False
    at_end = True

    def __init__(
        self,
        host: Host,
        adapter: Adapter,
        held: Sequence[HeldOut],
        dataset: Dataset,
        settings: Training,
        total_steps: int,
        processes: Processes = ALONE,
        *,
        same_passes: bool = False,
    ) -> None:
        assert settings.validation is not None
        self._host, self._adapter, self._processes = host, adapter, processes
        self._sharing = ALONE if same_passes else processes
        self._settings, self._total_steps = settings.validation, total_steps
        self.every, self.at_start = settings.validation.every, settings.validation.before
        self._row_length = pass_length(dataset, settings)
        self._held = held
        self._seen = [one for one in held if len(one.split)]
        self._asked = [one for one in self._seen if one.metric is not None]
        batches = _batches(dataset, self._row_length)
        owners = torch.cat([batch.owners for batch in batches])
        self._counts = torch.bincount(owners, minlength=len(held)).tolist()  # S_t
        self._batches = self._sharing.mine(batches)

    def look(self, step: int) -> Seen:
        """The loss and the metric of each task that has held-out examples, and their averages."""
        # Processes may differ by rounding, and must agree on what follows.
        losses, measured = self._processes.same((self.losses(), self.metrics()))
        # JSON has no NaN; the next step's own loss ends such a run.
        loss = {name: v if math.isfinite(v) else None for name, v in losses.items()}
        event: dict[str, Any] = {
            "event": "validation",
            "step": step,
            "loss": loss,
            "examples": {one.task.name: len(one.split) for one in self._seen},
            "macro": {"loss": _mean(loss.values())},
        }
        if self._settings.metric:
            values = {name: one.value for name, one in measured.items()}
            event["metric"] = {name: values.get(name) for name in loss}
            event["metric_name"] = {one.task.name: one.title for one in self._asked}
            if self._alike():
                event["macro"]["metric"] = _mean(values.values())
            event["guess"] = {name: one.guess for name, one in measured.items() if one.guess}
            event["one_answer"] = {
                name: one.one_answer for name, one in measured.items() if one.one_answer
            }
        told = f"validation after step {step}/{self._total_steps}  {_told(event)}"
        # Nothing is learned before the first step, and no checkpoint is of it.
        return Seen(event, told, self._mark(event) if step else None)

    def _alike(self) -> bool:
        """Whether a mean of the tasks' metrics says something: metres and shares have none."""
        if not any(one.task.objective in MAPS for one in self._asked):
            return True
        return len({find(one.metric or "").better for one in self._asked}) == 1

    def _mark(self, event: Mapping[str, Any]) -> Mark | None:
        """What `training.validation.best` goes by: the metric where there is one, else the loss."""
        name = self._settings.best
        if name is None:
            return None
        chosen = [one for one in self._seen if name in (MACRO, one.task.name)]
        asked = [one for one in chosen if one.metric is not None]
        kind = "metric" if asked else "loss"
        what = kind if name == MACRO or not asked else asked[0].title
        count = sum(len(one.requests) or len(one.split) for one in asked or chosen)
        value = event[MACRO][kind] if name == MACRO else event[kind][name]
        higher = bool(asked) and direction(one.metric or "" for one in asked) == "higher"
        return Mark(f"{name} {what} on {count:,} held-out examples", value, higher=higher)

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """(1 / S_t) Σ_i ℓ_i over the S_t units of each task's examples."""
        device = self._adapter.device
        sums = torch.zeros(len(self._held), dtype=torch.float64, device=device)
        with undisturbed(self._host, self._adapter):
            for batch in self._batches:
                threads.look(device)
                moved = batch.to(device)
                with self._host.routed(moved):
                    sums.index_add_(0, batch.owners.to(device), self._host.losses(moved).double())
        self._sharing.sum_(sums)
        return {
            one.task.name: float(own) / count
            for one, own, count in zip(self._held, sums, self._counts, strict=True)
            if count
        }

    def metrics(self) -> dict[str, TaskLook]:
        """The metric of each task that has one, by the log-probabilities of its choices, or by its maps."""
        if not self._asked:
            return {}
        host, device = self._host, self._adapter.device
        if not isinstance(host, PackedModel):
            tasks, names = [one.task for one in self._held], [one.metric for one in self._held]
            with undisturbed(host, self._adapter):
                values = map_values(host, self._batches, tasks, names, device, self._sharing)
            return {task: TaskLook(value) for task, value in values.items()}
        requests = [request for one in self._asked for request in one.requests]
        with undisturbed(host, self._adapter):
            sums = iter(
                ask(
                    host,
                    requests,
                    partial(_logprobs, host),
                    device=device,
                    tokens_per_pass=self._row_length,
                    processes=self._sharing,
                )
            )
        found = {}
        for one in self._asked:
            scores = [next(sums)[:, 0] for _ in one.requests]
            found[one.task.name] = one.measured(scores)
        return found


def _logprobs(packed: PackedModel, batch: PackedBatch) -> Tensor:
    """log p of what is asked, [S, 1].

    Not in inference mode, whose tensors could not be trained with: some of those that a pass
    makes stay, such as weights that ZeRO gathers.
    """
    with torch.inference_mode(False), torch.no_grad():
        return cast(Tensor, packed(batch)).unsqueeze(1)


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean; None of nothing, and where one of the values is undefined."""
    found = list(values)
    known = [value for value in found if value is not None]
    return fmean(known) if known and len(known) == len(found) else None


def _told(event: Mapping[str, Any]) -> str:
    """`rte 0.712 (accuracy 0.654)  …  macro 0.512 (0.711)`."""
    names, values = event.get("metric_name", {}), event.get("metric", {})
    one_sided = event.get("one_answer", {})

    def metric(task: str) -> str:
        one = one_sided.get(task)
        always = "" if one is None else f", nearly always '{one['choice']}'"
        return f" ({names[task]} {_number(values[task])}{always})" if task in names else ""

    parts = [f"{task} {_number(loss)}{metric(task)}" for task, loss in event["loss"].items()]
    if len(parts) > _TOLD:
        parts[_TOLD:] = [f"{len(parts) - _TOLD} more tasks"]
    if len(parts) > 1:
        macro = event[MACRO]
        parts.append(
            f"{MACRO} {_number(macro['loss'])}"
            + (f" ({_number(macro['metric'])})" if names and "metric" in macro else "")
        )
    return "  ".join(parts)


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _batches(dataset: Dataset, row_length: int) -> list[Batch]:
    """Passes of one row at most."""
    places = [
        (task, n) for task, lengths in enumerate(dataset.lengths) for n in range(len(lengths))
    ]
    costs = [int(length) for lengths in dataset.lengths for length in lengths]
    return [
        dataset.collate([[places[i] for i in chosen]]) for chosen in fill_passes(costs, row_length)
    ]
