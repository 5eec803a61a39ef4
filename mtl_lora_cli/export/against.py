"""A merged or exported model, asked by its own program alone, beside the run that it comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_lora_cli.adapters.files import CONFIG_FILE
from mtl_lora_cli.errors import CheckError, UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.protocols import LM_EVAL, Setting
from mtl_lora_cli.evaluation.results import OUTCOME, beside
from mtl_lora_cli.export.comparison import largest_difference
from mtl_lora_cli.export.formats import FORMATS, Format, blamed
from mtl_lora_cli.export.questions import Questions
from mtl_lora_cli.metrics.intervals import measure
from mtl_lora_cli.tasks.task import Task


def find_folders(folder: Path, tasks: Sequence[Task], setting: Setting) -> list[Path]:
    """What each task is scored against: the folder itself, or its subfolder of the task's name.

    Raises:
        UsageError: there is none, it is nothing that was merged or exported, or the protocol is the
            harness's.
    """
    if setting.protocol == LM_EVAL or setting.base_only:
        raise UsageError(
            "--against compares the run's adapter by the protocols choices and generate"
        )
    if not folder.is_dir():
        raise UsageError(f"--against {folder}: no such folder")
    if (folder / CONFIG_FILE).is_file():
        raise UsageError(
            f"--against {folder}: is a run's own adapter; compare runs with --baseline"
        )
    if len(tasks) == 1 and _format_of(folder) is not None:
        folders = [folder]
    else:
        folders = [folder / task.name for task in tasks]
    for one in folders:
        _form(one)
    return folders


def _form(folder: Path) -> Format:
    if (folder / CONFIG_FILE).is_file():
        raise UsageError(
            f"--against {folder}: is a run's own adapter; compare runs with --baseline"
        )
    kind = _format_of(folder)
    if kind is None:
        markers = ", ".join(dict.fromkeys(kind.marker for kind in FORMATS.values()))
        raise UsageError(
            f"--against {folder}: expected a folder that merge or export wrote, with one of {markers}"
        )
    form = kind()
    form.require_reader()
    return form


def _format_of(folder: Path) -> type[Format] | None:
    """By its marker a folder is known; what was declared last is asked first, a merged model last of all."""
    kinds = reversed(FORMATS.values())
    return next((kind for kind in kinds if (folder / kind.marker).is_file()), None)


def against(
    run: Run,
    task: Task,
    setting: Setting,
    folder: Path,
    result: Mapping[str, Any],
    scores: Sequence[np.ndarray] | None,
) -> dict[str, Any]:
    """Score what lies in a folder on the rows of a result of the run's.

    Args:
        run: the run that it was merged or exported from.
        task: which of its tasks.
        setting: as the result came about.
        folder: from `find_folders`.
        result: the run's own.
        scores: the log-probabilities that it came from; None where answers were generated.

    Returns:
        See `mtl_lora_cli.evaluation.results.beside`; besides, the `folder`, the `largest` difference
        of a log-probability, and the share of `equal` predictions.

    Raises:
        UsageError: it cannot be loaded, or free answers cannot be generated with it.
    """
    try:
        form = _form(folder)
        with blamed(form):
            said = form.read(Questions(run, task, setting), folder)
    except CheckError as error:
        raise UsageError(f"--against {folder}: {error}") from None
    if said.outcome is None:
        raise UsageError(
            f"--against {folder}: llama.cpp is asked for log-probabilities alone, and task "
            f"'{task.name}' has free answers"
        )
    theirs = {
        **result,
        "id": None,
        "harness": None,
        "metrics": {n: dataclasses.asdict(measure(n, said.outcome)) for n in result["metrics"]},
        **{name: getattr(said.outcome, name) for name in OUTCOME},
    }
    equal = float(np.mean(np.asarray(result["predicted"]) == said.outcome.predicted))
    largest = None if scores is None else largest_difference(scores, said.scores)
    return {"folder": str(folder), "equal": equal, "largest": largest, **beside(theirs, result)}
