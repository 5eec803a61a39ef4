"""Evaluating a run's tasks, and keeping what was found in the run folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.prepare import Examples, held_out_examples
from mtl_lora_cli.errors import UsageError, did_you_mean
from mtl_lora_cli.evaluation.choices import Request, build_requests, score
from mtl_lora_cli.evaluation.generate import generate, parse_answer
from mtl_lora_cli.evaluation.metrics import Outcome, mcnemar, measure
from mtl_lora_cli.evaluation.open_run import OpenRun
from mtl_lora_cli.runs.folder import RunFolder, read_json, save_json
from mtl_lora_cli.tasks.rendering import prefix_conflict
from mtl_lora_cli.tasks.task import Task

CHOICES = "choices"  # the candidate answer with the highest summed log-probability
GENERATE = "generate"  # the greedy answer, read as the choice that it begins with
PROTOCOLS = (CHOICES, GENERATE)


@dataclass(frozen=True)
class Setting:
    """What is evaluated, besides the task: two results with one setting can be compared."""

    split: str | None = None  # None: test, or validation where there is no test split
    limit: int | None = None  # the first rows only
    base_only: bool = False
    protocol: str | None = None  # None: choices, or generate for free answers

    def protocol_of(self, task: Task) -> str:
        """The protocol by which one task is scored."""
        return self.protocol or (GENERATE if task.template.choices is None else CHOICES)


def select_tasks(tasks: Sequence[Task], name: str) -> list[Task]:
    """The tasks that `--task NAME|all` names.

    Raises:
        UsageError: the run has no such task.
    """
    if name == "all":
        return list(tasks)
    found = [task for task in tasks if task.name == name]
    if not found:
        known = [task.name for task in tasks]
        raise UsageError(
            f"unknown task '{name}'{did_you_mean(name, known)}; tasks of this run: {', '.join(known)}"
        )
    return found


def held_out(task: Task, setting: Setting) -> Examples:
    """The rows that a task is evaluated on.

    Raises:
        UsageError: it has no such split, or cannot be scored by the protocol.
    """
    examples = held_out_examples(task, setting.split)
    if examples is None:
        wanted = setting.split or "test or validation"
        raise UsageError(f"task '{task.name}': its source has no {wanted} split")
    end = setting.limit
    examples = dataclasses.replace(
        examples,
        examples=examples.examples[:end],
        wheres=examples.wheres[:end],
        rows=examples.rows[:end],
    )
    protocol = setting.protocol_of(task)
    if protocol == CHOICES and task.template.choices is None:
        raise UsageError(
            f"task '{task.name}': its template '{task.template_name}' has free answers; "
            f"the protocol '{CHOICES}' scores choices: use --protocol {GENERATE}"
        )
    if protocol == GENERATE and task.template.scoring == "expectation":
        raise UsageError(
            f"task '{task.name}': it is scored as an expectation over its choices, which answers "
            f"that are generated do not give: use --protocol {CHOICES}"
        )
    if protocol == GENERATE:
        for example, where in zip(examples.examples, examples.wheres, strict=True):
            conflict = prefix_conflict(example.choices)
            if conflict is not None:
                raise UsageError(
                    f"{where}: task '{task.name}': the choice '{conflict[0]}' begins the choice "
                    f"'{conflict[1]}', so a generated answer cannot tell them apart: "
                    f"use --protocol {CHOICES}"
                )
    return examples


def evaluate(
    opened: OpenRun,
    tasks: Sequence[Task],
    setting: Setting,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Score tasks and write one result each into the run folder.

    Args:
        opened: the run with its model.
        tasks: some of its tasks.
        setting: rows, protocol, and whether the base model alone is asked.
        advance: called with (examples done, examples in all).

    Returns:
        The results, as they stand in `evaluations/ID.json`.
    """
    held = [held_out(task, setting) for task in tasks]
    started = time.monotonic()
    answers = predict(opened, tasks, held, setting, advance)
    seconds = time.monotonic() - started
    results = []
    for task, examples, (requests, outcome) in zip(tasks, held, answers, strict=True):
        result = _result(opened, task, examples, requests, outcome, setting)
        result["seconds_of_all_tasks"] = seconds
        _store(opened.folder, result)
        results.append(result)
    return results


def predict(
    opened: OpenRun,
    tasks: Sequence[Task],
    held: Sequence[Examples],
    setting: Setting,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[list[Request], Outcome]]:
    """Ask the model; write nothing.

    Args:
        opened: the run with its model.
        tasks: some of its tasks.
        held: the rows of each.
        setting: protocol, and whether the base model alone is asked.
        advance: called with (examples done, examples in all).

    Returns:
        For each task what was asked, and the outcome.
    """
    encoder = Encoder(opened.tokenizer, opened.recipe.prompt_format)
    requests: list[list[Request]] = []
    for task, examples in zip(tasks, held, strict=True):
        number = -1 if setting.base_only else task.id
        requests.append(build_requests(examples.examples, number, encoder, opened.longest))
    total = sum(len(part) for part in requests)
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        advance(done, total)

    scored = [index for index, task in enumerate(tasks) if setting.protocol_of(task) == CHOICES]
    scores = iter(
        score(
            opened.packed,
            [request for index in scored for request in requests[index]],
            device=opened.device,
            tokens_per_pass=opened.tokens_per_pass,
            advance=step,
        )
    )
    outcomes = [
        outcome_of(task, examples, [next(scores) for _ in part])
        if index in scored
        else _generated(opened, examples, part, encoder.end, step)
        for index, (task, examples, part) in enumerate(zip(tasks, held, requests, strict=True))
    ]
    return list(zip(requests, outcomes, strict=True))


def _generated(
    opened: OpenRun,
    examples: Examples,
    requests: Sequence[Request],
    end: int,
    advance: Callable[[int], None],
) -> Outcome:
    """Outcome of greedy answers; one that names no choice is wrong, and predicted as -1."""
    answers = generate(
        opened.packed,
        requests,
        end=end,
        new_tokens=[max(len(choice) for choice in r.choices) + 1 for r in requests],
        device=opened.device,
        tokens_per_pass=opened.tokens_per_pass,
        advance=advance,
    )
    texts = opened.tokenizer.batch_decode(answers, skip_special_tokens=True)
    predicted, gold = [], []
    for text, example in zip(texts, examples.examples, strict=True):
        if example.choices:
            predicted.append(parse_answer(text, example.choices))
            gold.append(example.gold)
        else:
            predicted.append(0 if text.strip() == example.answer else -1)
            gold.append(0)
    return Outcome(np.asarray(gold), np.asarray(predicted))


def _result(
    opened: OpenRun,
    task: Task,
    examples: Examples,
    requests: Sequence[Request],
    outcome: Outcome,
    setting: Setting,
) -> dict[str, Any]:
    gold = outcome.gold.tolist()
    count = len(gold)
    protocol = setting.protocol_of(task)
    has_choices = task.template.choices is not None
    return {
        "task": task.name,
        "split": examples.split,
        "protocol": protocol,
        "normalisation": "sum" if protocol == CHOICES else None,
        "prompt_format": opened.recipe.prompt_format,
        "loss_on": opened.recipe.training.loss_on,
        "template": {"name": task.template_name, "version": task.template.version},
        "model": "base" if setting.base_only else "adapter",
        "checkpoint": None if setting.base_only else opened.checkpoint,
        "base_model": opened.base.identity(),
        "dtype": str(opened.dtype).removeprefix("torch."),
        "quantization": opened.recipe.quantization,
        "limit": setting.limit,
        "rows_fingerprint": examples.fingerprint,
        "examples": count,
        "truncated_prompts": sum(request.truncated for request in requests),
        "unparsable": int((outcome.predicted < 0).sum()),
        "tokens": sum(request.cost for request in requests),
        "majority": Counter(gold).most_common(1)[0][1] / count if has_choices else None,
        "chance": (
            float(np.mean([1 / len(example.choices) for example in examples.examples]))
            if has_choices
            else None
        ),
        "metrics": {
            name: dataclasses.asdict(measure(name, outcome)) for name in task.template.metrics
        },
        "gold": gold,
        "predicted": outcome.predicted.tolist(),
    }


def outcome_of(task: Task, examples: Examples, scores: Sequence[np.ndarray]) -> Outcome:
    """Predictions from log-probabilities: the likeliest choice, or the expected value."""
    template = task.template
    gold = np.asarray([example.gold for example in examples.examples])
    predicted = np.asarray([int(np.argmax(values)) for values in scores])
    probabilities = [np.exp(values - np.logaddexp.reduce(values)) for values in scores]
    if template.scoring == "expectation":
        grid = np.asarray([float(label) for label in template.labels or []])
        return Outcome(
            gold,
            predicted,
            gold_value=np.asarray([example.value for example in examples.examples]),
            predicted_value=np.asarray([float(p @ grid) for p in probabilities]),
        )
    positive = template.positive_index
    two = all(len(values) == 2 for values in scores)
    return Outcome(
        gold,
        predicted,
        positive_score=np.asarray([p[positive] for p in probabilities]) if two else None,
        positive=positive,
    )


def compare_with_base(folder: RunFolder, result: dict[str, Any]) -> dict[str, Any] | None:
    """The stored result of the untouched base model on the same rows, with a paired test.

    Returns:
        Its metrics and, under `p_value`, McNemar's exact test; None where there is none yet.
    """
    same = ("task", "split", "protocol", "prompt_format", "limit", "rows_fingerprint", "template")
    for entry in reversed(stored(folder)):
        if entry["model"] != "base" or any(entry[key] != result[key] for key in same):
            continue
        right = [
            [g == p for g, p in zip(r["gold"], r["predicted"], strict=True)]
            for r in (entry, result)
        ]
        return {"metrics": entry["metrics"], "p_value": mcnemar(*right)}
    return None


def stored(folder: RunFolder) -> list[dict[str, Any]]:
    """All results of a run, oldest first."""
    index = folder.evaluations / "index.json"
    if not index.is_file():
        return []
    return [read_json(folder.evaluations / f"{i}.json") for i in read_json(index)["evaluations"]]


def _store(folder: RunFolder, result: dict[str, Any]) -> None:
    what = json.dumps(
        [result[key] for key in ("task", "split", "protocol", "model", "checkpoint", "limit")]
    )
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{stamp}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"
    folder.evaluations.mkdir(exist_ok=True)
    save_json(folder.evaluations / f"{name}.json", {"id": name, **result})
    index = folder.evaluations / "index.json"
    known = read_json(index)["evaluations"] if index.is_file() else []
    save_json(index, {"evaluations": [*[i for i in known if i != name], name]})
