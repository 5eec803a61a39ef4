"""The protocol `lm-eval`: lm-evaluation-harness runs one of its tasks on one task of a run.

Its rows, prompts, few-shot examples, requests and metrics are the harness's own; ours is the model, with
the run's task set.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_lora_cli.errors import LeftOutError, MtlLoraError, UsageError, did_you_mean
from mtl_lora_cli.evaluation.requests import one_begins_another
from mtl_lora_cli.metrics.intervals import Measured, wilson
from mtl_lora_cli.tasks.task import Task

if TYPE_CHECKING:
    from mtl_lora_cli.evaluation.lm_eval_model import AdaptedLM
    from mtl_lora_cli.evaluation.opened import Run

_RESAMPLES = 1000  # for metrics that have no standard error in closed form
_NORMAL = 1.959963984540054  # standard errors in half of a 95 % interval


@dataclass(frozen=True)
class HarnessTask:
    """One of the harness's tasks.

    Attributes:
        name: as the harness knows it, or a file like its own.
        manager: the harness's TaskManager that finds it.
    """

    name: str
    manager: Any


@dataclass(frozen=True)
class HarnessResult:
    """What the harness found.

    Attributes:
        identity: task, version, few-shot examples, and the harness's own version.
        split: of the harness's data.
        metrics: the harness's metrics; one with a filter is named METRIC,FILTER.
        gold, predicted: index of the right and of the predicted choice of each example; where the
            harness's task has no choices, 0 is right and −1 wrong by its first metric.
        fingerprint: of the rows and what was asked.
        ends_counted: examples in which the tokens of one choice begin another's; `metrics` has the
            harness's figures, and beside them those with the end of each choice counted there.
    """

    identity: dict[str, Any]
    split: str
    metrics: dict[str, Measured]
    gold: list[int]
    predicted: list[int]
    fingerprint: str
    ends_counted: int = 0


def require_harness() -> None:
    """Refuse the protocol where the harness is not installed.

    Raises:
        UsageError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "--protocol lm-eval needs lm-evaluation-harness, which is not installed; get it with: "
            "pip install 'mtl-lora[lm-eval]'"
        )


def harness_tasks(tasks: Sequence[Task], wanted: str | None) -> Callable[[Task], HarnessTask]:
    """A function from one of the run's tasks to the harness's.

    Args:
        tasks: of the run.
        wanted: the harness's name of it, or a file like the harness's own (`.yaml`); None: the one
            that has the name of the run's task or of its template.

    Raises:
        UsageError: the harness has none of that name, or one is named for several tasks.
        LeftOutError: from the function; the harness has no task of that name or template.
    """
    require_harness()
    for task in tasks:
        if task.template.images:
            raise UsageError(
                f"task '{task.name}': lm-evaluation-harness is asked texts; it shows pictures"
            )
    if wanted is not None and len(tasks) > 1:
        raise UsageError(f"--harness-task {wanted} stands for one task; name it with --task")
    from lm_eval.tasks import TaskManager

    if wanted is not None and wanted.endswith((".yaml", ".yml")):
        if not Path(wanted).is_file():
            raise UsageError(f"--harness-task {wanted}: no such file")
        file = HarnessTask(wanted, TaskManager(include_defaults=False))
        return lambda task: file
    manager = TaskManager()
    known = set(manager.all_subtasks)
    return lambda task: HarnessTask(_known_name(task, wanted, known), manager)


def _known_name(task: Task, wanted: str | None, known: set[str]) -> str:
    template = Path(task.template_name).stem
    candidates = [wanted] if wanted is not None else [task.name, template]
    for name in candidates:
        if name in known:
            return name
    near = did_you_mean(wanted or task.name, known)
    if wanted is not None:
        raise UsageError(f"--harness-task: the harness has no task '{wanted}'{near}")
    raise LeftOutError(
        task.name,
        "cannot be scored by the protocol lm-eval: the harness has no task "
        f"'{task.name}' and none '{template}'{near}; name one with --harness-task",
    )


def run_harness(
    opened: Run, task: Task, harness: HarnessTask, *, base_only: bool, limit: int | None
) -> HarnessResult:
    """Let the harness evaluate one task.

    Args:
        opened: the run with its model.
        task: whose adapter answers.
        harness: what is asked.
        base_only: the base model alone answers.
        limit: the first so many examples.

    Raises:
        MtlLoraError: the harness cannot load its data, or fails at something else.
    """
    from lm_eval import __version__, simple_evaluate

    from mtl_lora_cli.evaluation.lm_eval_model import AdaptedLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = AdaptedLM(opened, -1 if base_only else task.id)
    try:
        found = simple_evaluate(
            model=model,
            tasks=[harness.name],
            task_manager=harness.manager,
            limit=limit,
            bootstrap_iters=_RESAMPLES,
            apply_chat_template=opened.recipe.prompt_format == "chat",
        )
    except MtlLoraError:
        raise
    except Exception as error:  # the harness, its tasks and their data raise whatever they like
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise MtlLoraError(f"the harness's task '{harness.name}' failed: {text}") from error
    assert found is not None  # it is, on other ranks only
    if len(found["samples"]) != 1:
        several = ", ".join(found["samples"])
        raise UsageError(f"--harness-task {harness.name}: stands for several tasks: {several}")
    ((name, every),) = found["samples"].items()
    samples = [sample for sample in every if sample["filter"] == every[0]["filter"]]
    config = found["configs"][name]
    gold, predicted = zip(*(_answer(sample) for sample in samples), strict=True)
    ended = _with_ends(model, samples)
    return HarnessResult(
        identity={
            "task": name,
            "version": found["versions"].get(name),
            "num_fewshot": found["n-shot"].get(name),
            "lm_eval": __version__,
        },
        split=config.get("test_split") or config.get("validation_split") or "",
        metrics={
            **_metrics(found["results"][name]),
            **_ended_metrics(samples, ended, len(model.answer_end)),
        },
        gold=list(gold),
        predicted=list(predicted),
        fingerprint=_fingerprint(samples),
        ends_counted=len(ended),
    )


def _metrics(found: Mapping[str, Any]) -> dict[str, Measured]:
    """The harness's `METRIC,FILTER` with `METRIC_stderr,FILTER` as a normal interval around it."""
    metrics = {}
    for key, value in found.items():
        name, _, kind = key.partition(",")
        if not kind or name.endswith("_stderr"):
            continue
        shown = name if kind == "none" else key
        if not isinstance(value, int | float) or not math.isfinite(value):
            metrics[shown] = Measured(None, why=f"the harness says {value}")
            continue
        low = high = None
        error = found.get(f"{name}_stderr,{kind}")
        if isinstance(error, int | float) and math.isfinite(error):
            low, high = value - _NORMAL * error, value + _NORMAL * error
        metrics[shown] = Measured(float(value), low, high)
    return metrics


def _choices(sample: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Context and continuation of each of a sample's choices; none where it has no choices."""
    if not isinstance(sample["target"], int) or len(sample["filtered_resps"]) < 2:
        return []
    return [(asked[0], asked[1]) for asked in sample["arguments"]]


def _with_ends(model: AdaptedLM, samples: Sequence[Mapping[str, Any]]) -> dict[int, list[float]]:
    """By place in `samples`: log p of its choices with their ends, where one begins another."""
    places: dict[int, list[tuple[list[int], list[int]]]] = {}
    for number, sample in enumerate(samples):
        pairs = [model._encode_pair(*asked) for asked in _choices(sample)]
        if len({tuple(context) for context, _ in pairs}) == 1 and one_begins_another(
            [choice for _, choice in pairs]
        ):
            places[number] = pairs
    asked = [pair for pairs in places.values() for pair in pairs]
    values = iter(model.with_ends(asked))
    return {number: [next(values) for _ in pairs] for number, pairs in places.items()}


def _ended_metrics(
    samples: Sequence[Mapping[str, Any]], ended: Mapping[int, list[float]], end: int
) -> dict[str, Measured]:
    """`acc` and `acc_norm` with the end of each choice counted where one begins another.

    Args:
        samples: the harness's.
        ended: from `_with_ends`.
        end: how many tokens the end has; for `acc_norm` they are as many characters.
    """
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for number, sample in enumerate(samples if ended else []):
        choices = _choices(sample)
        if not choices:
            return {}
        own = ended.get(number)
        values = np.asarray(own or [logprob for logprob, _ in sample["filtered_resps"]])
        more = end if own else 0
        lengths = np.asarray([len(text.removeprefix(" ")) + more for _, text in choices])
        for name, scores in (("acc", values), ("acc_norm", values / lengths)):
            right[name].append(int(scores.argmax()) == sample["target"])
    return {
        f"{name} (ends counted)": Measured(float(np.mean(own)), *wilson(sum(own), len(own)))
        for name, own in right.items()
        if own
    }


def _answer(sample: Mapping[str, Any]) -> tuple[int, int]:
    """Right and predicted index of one of the harness's samples."""
    target, answers = sample["target"], sample["filtered_resps"]
    if isinstance(target, int) and len(answers) > 1:
        return target, int(np.argmax([logprob for logprob, _ in answers]))
    first = sample[sample["metrics"][0]]
    return 0, 0 if first == 1 else -1


def _fingerprint(samples: Sequence[Mapping[str, Any]]) -> str:
    """A hash of the rows, prompts and right answers, in the form of a split's."""
    hashes = [sample[f"{part}_hash"] for sample in samples for part in ("doc", "prompt", "target")]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]
