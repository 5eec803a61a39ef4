"""Every example of an evaluation with what was asked, said and right, a line of JSON each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.answers import Answers
from mtl_lora_cli.evaluation.protocols import CHOICES, GENERATE, LM_EVAL, Setting
from mtl_lora_cli.evaluation.scored import normalised
from mtl_lora_cli.runs.atomic import write_text
from mtl_lora_cli.runs.paths import require_replaceable
from mtl_lora_cli.runs.paths import require_writable as require_folder
from mtl_lora_cli.tasks.pictured import unplaced
from mtl_lora_cli.tasks.task import Task


def require_writable(path: Path, setting: Setting) -> None:
    """Refuse, before anything is scored, what would not be written.

    Raises:
        UsageError: the harness keeps its own samples, the file's folder is not there, or the file holds
            something else than predictions.
    """
    if setting.protocol == LM_EVAL:
        raise UsageError(
            f"--predictions goes with the protocols {CHOICES} and {GENERATE}, not with {LM_EVAL}"
        )
    if path.is_dir():
        raise UsageError(f"--predictions {path}: is a folder, expected a file")
    if not path.parent.is_dir():
        raise UsageError(f"--predictions {path}: the folder {path.parent} is not there")
    require_folder(path.parent, f"--predictions {path}")
    require_replaceable(
        path, f"--predictions {path}", "predictions", (b'{"task": ', b'"prompt_sha256": ')
    )


class Predictions:
    """Collects what `evaluate` tells, and writes it as one file.

    Args:
        setting: what was asked.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._lines: list[str] = []

    def tell(self, task: Task, examples: Examples, answers: Answers) -> None:
        """Take the answers to one task."""
        for line in _lines(task, examples, answers, self._setting):
            self._lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False))

    def __len__(self) -> int:
        return len(self._lines)

    def write(self, path: Path) -> None:
        """Write them, whole or not at all."""
        write_text(path, "".join(f"{line}\n" for line in self._lines))


def _lines(
    task: Task, examples: Examples, answers: Answers, setting: Setting
) -> Iterator[dict[str, Any]]:
    how = setting.normalisation_of(task)
    scores = answers.scores
    divided = (
        None if scores is None else normalised(scores, examples, answers.requests, how or "sum")
    )
    outcome = answers.outcome
    for number, example in enumerate(examples.examples):
        predicted, gold = int(outcome.predicted[number]), int(outcome.gold[number])
        line: dict[str, Any] = {
            "task": task.name,
            "split": examples.split,
            "row": examples.first + number,
            "where": examples.wheres[number],
            "prompt_sha256": hashlib.sha256(unplaced(example.prompt).encode()).hexdigest(),
            **({"pictures": [one.address for one in example.images]} if example.images else {}),
            "truncated": answers.requests[number].truncated,
            "predicted": predicted,
            "gold": gold,
            "right": predicted == gold,
            "answer": example.answer,
        }
        if scores is not None and divided is not None:
            line |= {
                "choices": list(example.choices),
                "log_probabilities": scores[number].tolist(),
                "scores": divided[number].tolist(),
                "ends_counted": answers.requests[number].ends > 0,
            }
        if answers.texts is not None:
            line["generated"] = answers.texts[number]
        if answers.several is not None:
            line["answers"] = answers.several[number]
        if outcome.predicted_value is not None and outcome.gold_value is not None:
            line |= {
                "predicted_value": float(outcome.predicted_value[number]),
                "gold_value": float(outcome.gold_value[number]),
            }
        yield line
