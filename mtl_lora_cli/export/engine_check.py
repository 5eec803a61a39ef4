"""`export --check vllm`: what was written, run by the engine that will serve it, all tasks mixed in one batch.

The engine lives in an environment of its own, whose interpreter is named: it and training seldom agree on versions of
torch. `vllm_program.py` is run there. It answers what every check asks, held-out rows of each task, and the run is
asked the same in this process.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtl_lora_cli.errors import CheckError, MtlLoraError, UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.export import vllm_program
from mtl_lora_cli.export.check import TOLERANCE, questions_about
from mtl_lora_cli.export.comparison import Comparison, compared
from mtl_lora_cli.export.engines import VLLM_RANKS, vllm_rank
from mtl_lora_cli.export.low_rank import ask_at
from mtl_lora_cli.export.order import Options, Say, WrittenFolder
from mtl_lora_cli.export.questions import Questions, Scored
from mtl_lora_cli.export.write import set_aside
from mtl_lora_cli.tasks.chosen import select_tasks

ENGINES = ("vllm",)
VARIABLE = "MTL_LORA_VLLM_PYTHON"
_OURS = "the run's adapter"
_INSTALLED = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"


@dataclass(frozen=True)
class Said:
    """What the engine said, and how the run compares.

    Attributes:
        version: of the engine.
        comparisons: task → comparison.
    """

    version: str
    comparisons: dict[str, Comparison]

    def lines(self) -> list[str]:
        """One of each task, for a person."""
        return [
            f"{task} in vLLM {self.version}: on {one.examples} held-out rows the largest difference of "
            f"log-probabilities is {one.largest:.2e}, equal answers {one.equal:.1%}"
            for task, one in self.comparisons.items()
        ]

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Task → what `--json` has more."""
        return {
            task: {
                "engine": {
                    "name": "vllm",
                    "version": self.version,
                    "examples": one.examples,
                    "largest_difference": one.largest,
                    "equal_answers": one.equal,
                }
            }
            for task, one in self.comparisons.items()
        }


def require_engine(kind: str, format_name: str, python: Path | None, run: Run) -> Path:
    """Refuse before anything is written what the engine could not check; its interpreter.

    Raises:
        UsageError: an unknown engine, none of its interpreters, or a run that it does not serve.
    """
    if kind not in ENGINES:
        raise UsageError(f"--check: expected {', '.join(ENGINES)}, received '{kind}'")
    if format_name != "peft":
        raise UsageError(f"--check vllm: vLLM reads --format peft, not {format_name}")
    if run.adapter.config.scales_rows:
        raise UsageError(
            "--check vllm: vLLM reads no DoRA; merge the task, and serve the merged model"
        )
    if python is None:
        raise UsageError(
            "--check vllm runs vLLM in an environment of its own: name its interpreter with --engine-python, "
            f"or in {VARIABLE}"
        )
    if not (python.is_file() and os.access(python, os.X_OK)):
        raise UsageError(f"--engine-python {python}: no interpreter")
    if subprocess.run([python, "-P", "-c", _INSTALLED], env=_environment(), check=False).returncode:
        raise UsageError(
            f"--engine-python {python}: vLLM is not installed there; get it with: {python} -m pip install vllm"
        )
    return python


def check_by_engine(
    run: Run, python: Path, written: Sequence[WrittenFolder], options: Options, say: Say
) -> Said:
    """Let vLLM answer held-out rows of all written tasks, mixed in one batch, and compare with the run.

    Args:
        run: that they are written from.
        python: the interpreter of vLLM's environment.
        written: folders of tasks, as PEFT reads them.
        options: as the call asks.
        say: called with progress lines.

    Raises:
        MtlLoraError: the engine fails; its last lines are told.
        CheckError: a task's answers differ; its folder lies aside.
    """
    asked = _questions(run, written, options.limit)
    say(
        f"vLLM answers {sum(len(one.requests) for one in asked.values())} rows, all tasks in one batch"
    )
    request = request_of(asked, {one.task: one.folder for one in written})
    answer = _run(python, request)
    said = read_answers(asked, request, answer)
    first = next(iter(asked.values()))
    packed = first.run.but(instead=None, quantization="none").packed
    found, faults = {}, []
    for one in written:
        questions = asked[one.task]
        rank = options.rank
        ours = questions.ask(packed) if rank is None else ask_at(questions, rank, "none")
        allowed = options.tolerance or TOLERANCE.get(questions.dtype, TOLERANCE[torch.bfloat16])
        comparison = compared(questions, said[one.task], {_OURS: ours}, allowed)
        found[one.task] = comparison
        if not comparison.holds:
            reason = (
                f"the adapter in vLLM differs from the run's on task '{one.task}': largest difference of "
                f"log-probabilities {comparison.largest:.3g}, equal answers {comparison.equal:.1%}; they had "
                f"to agree {comparison.asked}"
            )
            faults.append(set_aside(one.folder, one.folder, reason))
    if faults:
        raise CheckError("\n".join(faults))
    return Said(answer["version"], found)


def _questions(run: Run, written: Sequence[WrittenFolder], limit: int) -> dict[str, Questions]:
    """Task → its held-out rows, all to be asked of one model."""
    tasks = {one.task: select_tasks(run.tasks, one.task)[0] for one in written}
    first = questions_about(written[0].folder, run, tasks[written[0].task], limit)
    return {name: replace(first, task=task) for name, task in tasks.items()}


def request_of(asked: Mapping[str, Questions], folders: Mapping[str, Path]) -> dict[str, Any]:
    """What `vllm_program` is given: rows of all tasks in turns."""
    first = next(iter(asked.values()))
    most = max(len(one.requests) for one in asked.values())
    rows = [
        _row(task, one, number)
        for number in range(most)
        for task, one in asked.items()
        if number < len(one.requests)
    ]
    lengths = [len(row["prompt"]) + max([row["limit"], *map(len, row["choices"])]) for row in rows]
    rank = vllm_rank(list(folders.values()))
    if rank is None:
        raise UsageError(
            f"--check vllm: vLLM takes ranks up to {VLLM_RANKS[-1]}; --rank lowers one"
        )
    return {
        "model": str(first.run.base.folder),
        "dtype": str(first.dtype).removeprefix("torch."),
        "rank": rank,
        "length": min(max(lengths) + 1, first.run.longest),
        "adapters": {task: str(folder.absolute()) for task, folder in folders.items()},
        "questions": rows,
    }


def _row(task: str, questions: Questions, number: int) -> dict[str, Any]:
    request = questions.requests[number]
    found = {"task": task, "prompt": request.prompt, "choices": request.choices, "limit": 0}
    if not questions.free:
        return found
    free = questions.prompts[number]
    return found | {
        "limit": questions.limits[number],
        "ends": sorted(questions.encoder.stops),
        "asked": free.prompt,
    }


def read_answers(
    asked: Mapping[str, Questions], request: Mapping[str, Any], answer: Mapping[str, Any]
) -> dict[str, Scored]:
    """Task → what the engine says to its rows."""
    found = {}
    pairs = list(zip(request["questions"], answer["answers"], strict=True))
    for task, questions in asked.items():
        own = [said for row, said in pairs if row["task"] == task]
        scores = [np.array(said["scores"]) for said in own]
        if questions.free:
            answers = [_cut(said["answer"], questions) for said in own]
            found[task] = questions.read(scores, answers)
        else:
            found[task] = questions.answers(scores)
    return found


def _cut(answer: list[int], questions: Questions) -> list[int]:
    """A free answer up to where it is complete: the engine knows end tokens, and no texts."""
    if answer and answer[-1] in questions.encoder.stops:
        answer = answer[:-1]
    stopped = questions.stopped
    ends = (n for n in range(1, len(answer) + 1) if stopped(answer[:n]))
    return answer[: next(ends, len(answer))]


def _run(python: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's answer.

    Raises:
        MtlLoraError: it fails; with its last lines.
    """
    with tempfile.TemporaryDirectory(prefix="mtl-lora-") as place:
        asked, answer = Path(place, "request.json"), Path(place, "answer.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        call = [str(python), "-P", str(Path(vllm_program.__file__)), str(asked), str(answer)]
        ended = subprocess.run(
            call, env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )  # fmt: skip
        if ended.returncode or not answer.is_file():
            lines = [line for line in ended.stderr.splitlines() if line.strip()]
            raise MtlLoraError(
                f"vLLM ended with code {ended.returncode}: {lines[-1].strip() if lines else 'it said nothing'}"
            )
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _environment() -> dict[str, str]:
    """Ours, without what belongs to our own interpreter."""
    own = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in own}
