"""The form in which GLUE's server takes predictions: a table of index and prediction for each task.

Source: https://gluebenchmark.com/faq, and the sample submission that it names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.tasks.task import Task

HEADER = "index\tprediction"
_ENTAILMENT = ("entailment", "not_entailment")
_NUMBERS = ("0", "1")
_GENRES = ("entailment", "neutral", "contradiction")
_LABELS: dict[str, Sequence[str]] = {
    "cola": _NUMBERS,
    "sst2": _NUMBERS,
    "mrpc": _NUMBERS,
    "qqp": _NUMBERS,
    "wnli": _NUMBERS,
    "mnli": _GENRES,
    "mnli_mismatched": _GENRES,
    "qnli": _ENTAILMENT,
    "rte": _ENTAILMENT,
    "stsb": (),
}


def require_glue(task: Task) -> str:
    """What GLUE calls the task: the stem of its template.

    Raises:
        UsageError: it is none of GLUE's.
    """
    folder, _, stem = task.template_name.rpartition("/")
    if folder != "glue" or stem not in _LABELS:
        raise UsageError(
            f"--format glue: task '{task.name}' has the template '{task.template_name}', expected one "
            f"of glue/{', glue/'.join(_LABELS)}"
        )
    return stem


def line(name: str, number: int, row: Mapping[str, Any], prediction: Mapping[str, Any]) -> str:
    """One row's line.

    Args:
        name: from `require_glue`.
        number: of the row, from 0; its own `idx` or `index` counts more.
        row: its fields.
        prediction: see `mtl_lora_cli.evaluation.predict.Predictor`.

    Raises:
        UsageError: the template has labels of its own, which GLUE does not know.
    """
    index = row.get("idx", row.get("index", number))
    if name == "stsb":
        return f"{index}\t{prediction['value']:.3f}"
    label = str(prediction["label"])
    if label not in _LABELS[name]:
        raise UsageError(f"--format glue: GLUE's {name} has no label '{label}'")
    return f"{index}\t{label}"
