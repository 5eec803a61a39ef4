"""Evaluating a run's tasks, and keeping what was found in the run folder."""

from __future__ import annotations

import base64
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import numpy as np

from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.data.pictured import require_readable
from mtl_lora_cli.data.prepare import held_out_examples, rows_changed
from mtl_lora_cli.errors import LeftOutError
from mtl_lora_cli.evaluation.answers import Answers, Progress, Questions, predict
from mtl_lora_cli.evaluation.lm_eval_bridge import HarnessTask, harness_tasks, run_harness
from mtl_lora_cli.evaluation.maps import (
    HeldMaps,
    constant_of,
    constant_outcome,
    held_out_maps,
    measure_maps,
)
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.protocols import GENERATE, LM_EVAL, Setting, require_fit
from mtl_lora_cli.evaluation.results import (
    OUTCOME,
    compare_with_base,
    compare_with_run,
    pack,
    store,
    stored,
)
from mtl_lora_cli.evaluation.scored import outcome_of
from mtl_lora_cli.evaluation.windows import Part, answered, questions_ahead, together
from mtl_lora_cli.machine.processes import Processes
from mtl_lora_cli.metrics import Outcome
from mtl_lora_cli.metrics.declare import find
from mtl_lora_cli.metrics.guessing import no_better, one_answer
from mtl_lora_cli.metrics.intervals import Measured, measure
from mtl_lora_cli.metrics.paired import paired
from mtl_lora_cli.metrics.several import measure_mean, pass_at
from mtl_lora_cli.tasks.maps import MAPS
from mtl_lora_cli.tasks.task import Task

__all__ = [
    "Rows",
    "Setting",
    "asking",
    "compare_with_base",
    "compare_with_run",
    "evaluate",
    "find_rows",
    "held_out",
    "outcome_of",
    "predict",
    "stored",
]


def held_out(task: Task, setting: Setting) -> Examples:
    """The rows that a task is evaluated on.

    Raises:
        LeftOutError: it has no such split, or none of its rows, or cannot be scored by the protocol.
        UsageError: a file or a row is wrong.
    """
    examples = held_out_examples(task, setting.split)
    if examples is None:
        wanted = setting.split or "test or validation"
        raise LeftOutError(task.name, f"its source has no {wanted} split")
    if not examples.examples:
        raise LeftOutError(task.name, f"its {examples.split} split has no rows")
    if setting.limit is not None:
        examples = examples.part(0, setting.limit)
    require_fit(task, examples, setting.protocol_of(task))
    require_readable(examples.examples)
    if setting.blind is not None and not task.template.images:
        raise LeftOutError(task.name, f"--blind {setting.blind}: its prompts show no pictures")
    return examples


Rows = Sequence[Examples] | Sequence[HarnessTask] | Sequence[HeldMaps]
Told = Callable[[Task, Examples, Answers], None]


def find_rows(
    tasks: Sequence[Task], setting: Setting, left_out: dict[str, str] | None = None
) -> Rows:
    """What each task is evaluated on: a fault in the data shows before a model is loaded.

    Args:
        tasks: of a run.
        setting: as they are asked.
        left_out: gets the tasks that cannot be evaluated so, and why, in the place of an error, as long
            as one of them can.

    Returns:
        Of each task that is not left out, in order.

    Raises:
        UsageError: a task cannot be evaluated so, or none of them.
    """
    find: Callable[[Task], Any]
    if tasks and tasks[0].objective in MAPS:
        find = partial(held_out_maps, setting=setting)
    elif setting.protocol == LM_EVAL:
        find = harness_tasks(tasks, setting.harness_task)
    else:
        find = partial(held_out, setting=setting)
    found: list[Any] = []
    for task in tasks:
        try:
            found.append(find(task))
        except LeftOutError as error:
            if left_out is None or (len(left_out) + 1 == len(tasks) and not found):
                raise
            left_out[task.name] = error.why
    return found


@contextmanager
def asking(
    opened: Run, tasks: Sequence[Task], setting: Setting, rows: Rows
) -> Iterator[Callable[[], Questions | None]]:
    """Rows are made questions by another thread, while inside the block the model is loaded.

    What it gives waits for them; None where there are none to be made ahead. Its errors are those of `evaluate`.
    Questions about pictures are not made ahead: an empty model is made for them, and while a model is made or loaded
    transformers sets torch's default dtype, which all threads share: the other model got weights of the wrong one.
    `BUILDING` keeps the two apart, but then the empty one waits for the other, so nothing is gained; and a processor's numbers
    may be of the default dtype, which no lock over models covers.
    """
    if opened.of_maps or setting.protocol == LM_EVAL or opened.vision is not None:
        yield lambda: None
        return
    held = cast(Sequence[Examples], rows)
    opened.tokenizer, opened.longest  # noqa: B018 - libraries are imported here, by one thread
    with ThreadPoolExecutor(max_workers=1) as pool:
        yield pool.submit(questions_ahead, opened, tasks, held, setting).result


def evaluate(
    opened: Run,
    tasks: Sequence[Task],
    setting: Setting,
    advance: Progress = lambda done, total: None,
    *,
    rows: Rows | None = None,
    told: Told = lambda task, examples, answers: None,
    questions: Callable[[], Questions | None] = lambda: None,
) -> list[dict[str, Any]]:
    """Score tasks and write one result each into the run folder.

    Args:
        opened: the run with its model.
        tasks: some of its tasks.
        setting: rows, protocol, and whether the base model alone is asked.
        advance: called with (examples done, examples in all).
        rows: from `find_rows`, where they have been read already.
        told: is told of every task's answers; the harness gives none.
        questions: gives what `asking` makes.

    Returns:
        The results, as they stand in `evaluations/ID.json`.
    """
    rows = find_rows(tasks, setting) if rows is None else rows
    if opened.of_maps:
        found = _by_maps(opened, rows, setting, advance)
    elif setting.protocol == LM_EVAL:
        found = _by_harness(opened, tasks, rows, setting, advance)
    else:
        found = _by_ourselves(opened, tasks, rows, setting, advance, told, questions())
    results = []
    for task, own in zip(tasks, found, strict=True):
        result = {**_setting_of(opened, task, setting), **own}
        if Processes.of_group().rank == 0:
            result = {"id": store(opened.folder, result), **result}
        results.append(result)
    return results


def _setting_of(opened: Run, task: Task, setting: Setting) -> dict[str, Any]:
    """How a result came about: nothing of what was found."""
    protocol = setting.protocol_of(task)
    template = task.template
    return {
        "task": task.name,
        "protocol": protocol,
        "normalisation": setting.normalisation_of(task),
        "generate": template.generate.identity if protocol == GENERATE else None,
        "sampling": (
            dataclasses.asdict(setting.sampling)
            if setting.sampling is not None and protocol == GENERATE
            else None
        ),
        "prompt_format": opened.recipe.prompt_format,
        "chat": opened.recipe.chat.model_dump() if opened.recipe.prompt_format == "chat" else None,
        "loss_on": opened.recipe.training.loss_on,
        "template": {"name": task.template_name, "version": template.version},
        "conversation": task.overlay,
        "model": "base" if setting.base_only else "adapter",
        "checkpoint": None if setting.base_only else opened.checkpoint,
        "base_model": opened.base.identity(),
        "adapter_base_model": opened.trained_on,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "quantization": opened.recipe.quantization,
        "engine": opened.host.engine_report()["line"]
        if opened.of_maps
        else opened.packed.engine_line(),
        "limit": setting.limit,
        "source": setting.source,
        **({} if setting.blind is None else {"blind": setting.blind}),
    }


def _by_ourselves(
    opened: Run,
    tasks: Sequence[Task],
    rows: Rows,
    setting: Setting,
    advance: Progress,
    told: Told,
    questions: Questions | None,
) -> Iterator[dict[str, Any]]:
    """What was found for each task by the protocols `choices` and `generate`."""
    held = cast(Sequence[Examples], rows)
    started = time.monotonic()
    found: dict[int, list[Part]] = {number: [] for number in range(len(tasks))}
    for number, examples, own in answered(opened, tasks, held, setting, advance, questions):
        told(tasks[number], examples, own)
        found[number].append(Part.of(examples, own))
    seconds = time.monotonic() - started
    for number, (task, examples) in enumerate(zip(tasks, held, strict=True)):
        yield {
            "split": examples.split,
            "rows_fingerprint": examples.fingerprint,
            "rows_changed": setting.source is None and rows_changed(task, examples.split),
            **_found(task, together(found[number])),
            "seconds_of_all_tasks": seconds,
        }


def _found(task: Task, own: Part) -> dict[str, Any]:
    """What all answers to one task come to."""
    outcome, gold = own.outcome, own.outcome.gold.tolist()
    has_choices = task.template.choices is not None
    scored = own.scores is not None
    return {
        "examples": len(gold),
        "truncated_prompts": own.truncated,
        "unparsable": own.unparsable,
        "unreadable": own.unreadable,
        "ties": own.ties if scored else None,
        "one_answer": _one_answer(task, outcome) if has_choices else None,
        "guess": _guess(own) if has_choices else None,
        "ends_counted": own.ends if scored else 0,
        "tokens": own.tokens,
        "majority": Counter(gold).most_common(1)[0][1] / len(gold) if has_choices else None,
        "chance": float(np.mean(own.chances)) if has_choices else None,
        "metrics": {
            name: dataclasses.asdict(_measured(name, own)) for name in task.template.metrics
        },
        "pass_at": _passed(own),
        "titles": {name: task.template.title(name) for name in task.template.metrics},
        "harness": _as_harness(own) if scored else None,
        "positive": outcome.positive,
        **_of_each_row(outcome),
    }


def _measured(name: str, answers: Part) -> Measured:
    """A metric of the answers; of several to each row its mean over them."""
    if answers.outcomes is None:
        return measure(name, answers.outcome)
    return measure_mean(name, answers.outcomes)


def _passed(answers: Part) -> dict[str, Any] | None:
    """pass@k by k; None where each row was answered once."""
    if answers.outcomes is None:
        return None
    return {str(k): dataclasses.asdict(one) for k, one in pass_at(answers.outcomes).items()}


def _by_maps(
    opened: Run, rows: Rows, setting: Setting, advance: Progress
) -> Iterator[dict[str, Any]]:
    """What was found for each task whose answers are maps, and what one answer for all pixels comes to."""
    held = cast(Sequence[HeldMaps], rows)
    started = time.monotonic()
    measured = measure_maps(opened, held, advance)
    seconds = time.monotonic() - started
    for one, found in zip(held, measured, strict=True):
        template, outcome = one.task.template, found.outcome
        yield {
            "split": one.split,
            "rows_fingerprint": one.fingerprint,
            "rows_changed": setting.source is None and rows_changed(one.task, one.split),
            "examples": len(one.numbers),
            "truncated_prompts": None,
            "unparsable": None,
            "unreadable": None,
            "ties": None,
            "ends_counted": 0,
            "tokens": None,
            "majority": None,
            "chance": None,
            "size": list(opened.recipe.images.shape) if opened.recipe.images else None,
            "metrics": {
                name: dataclasses.asdict(measure(name, outcome)) for name in template.metrics
            },
            "titles": {name: template.title(name) for name in template.metrics},
            "constant": _constant(one, outcome),
            "shown": [base64.b64encode(panel).decode() for panel in found.shown],
            **_of_each_row(outcome),
            "seconds_of_all_tasks": seconds,
        }


def _constant(held: HeldMaps, outcome: Outcome) -> dict[str, Any] | None:
    """What the constant answer of training comes to on the same pictures, and what ours are better by."""
    constant = constant_of(held.task)
    if constant is None:
        return None
    theirs = constant_outcome(held, constant)
    names = [
        name
        for name in held.task.template.metrics
        if not any(find(name).undefined(one) for one in (outcome, theirs))
    ]
    return {
        "answer": constant.said,
        "metrics": {
            name: dataclasses.asdict(measure(name, theirs)) for name in held.task.template.metrics
        },
        "paired": {
            name: dataclasses.asdict(paired(name, outcome, theirs, held.task.name))
            for name in names
        },
    }


def _one_answer(task: Task, outcome: Outcome) -> dict[str, Any] | None:
    """The answer that nearly all rows get, by name; None where there is none such."""
    found = one_answer(outcome.gold, outcome.predicted)
    if found is None:
        return None
    return {**dataclasses.asdict(found), "choice": task.template.choice_name(found.choice)}


def _guess(answers: Part) -> dict[str, Any] | None:
    """The losses of answers that cannot be told from a guess; None where they can, or were generated."""
    outcome, scores = answers.outcome, answers.scores
    found = None if scores is None else no_better(outcome.gold, outcome.predicted, scores)
    return None if found is None else dataclasses.asdict(found)


_ALWAYS_THERE = ("gold", "predicted", "gold_value", "predicted_value", "positive_score")


def _of_each_row(outcome: Outcome) -> dict[str, Any]:
    """What the metrics were computed from; what few metrics read is there where one does."""
    parts = {name: getattr(outcome, name) for name in OUTCOME}
    return {
        name: None if part is None else pack(part) if name == "tallies" else _listed(part)
        for name, part in parts.items()
        if part is not None or name in _ALWAYS_THERE
    }


def _listed(values: np.ndarray) -> list[Any]:
    """As JSON has it, which knows no NaN: None behind a row's last choice."""
    if values.ndim == 1:
        return list(values.tolist())
    return [[None if np.isnan(value) else value for value in row] for row in values.tolist()]


def _as_harness(own: Part) -> dict[str, Any]:
    """`acc` and `acc_norm` as lm-evaluation-harness defines them: no end counts."""
    return {
        name: dataclasses.asdict(measure("accuracy", Outcome(own.outcome.gold, predicted)))
        for name, predicted in own.as_harness.items()
    }


def _by_harness(
    opened: Run,
    tasks: Sequence[Task],
    rows: Rows,
    setting: Setting,
    advance: Progress,
) -> Iterator[dict[str, Any]]:
    """What the harness found for each task."""
    started = time.monotonic()
    results = []
    for number, (task, harness) in enumerate(zip(tasks, rows, strict=True)):
        results.append(
            run_harness(
                opened,
                task,
                cast(HarnessTask, harness),
                base_only=setting.base_only,
                limit=setting.limit,
            )
        )
        advance(number + 1, len(tasks))
    seconds = time.monotonic() - started
    for found in results:
        yield {
            "template": None,  # the harness asks by its own
            "harness_task": found.identity,
            "split": found.split,
            "rows_fingerprint": found.fingerprint,
            "examples": len(found.gold),
            "truncated_prompts": None,
            "unparsable": None,
            "unreadable": None,
            "ties": None,
            "ends_counted": found.ends_counted,
            "tokens": None,
            "majority": None,
            "chance": None,
            "metrics": {name: dataclasses.asdict(value) for name, value in found.metrics.items()},
            "gold": found.gold,
            "predicted": found.predicted,
            "seconds_of_all_tasks": seconds,
        }
