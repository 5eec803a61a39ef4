"""The check after writing: what was written against the run, on held-out rows of its task.

It runs in a process of its own (`check_process.py`), in which the run is asked, and then, by another party's
code, what the format reads back from its files: one model after the other. The run is asked while the files are
written, where that needs none of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import Any

import torch

from mtl_lora_cli.errors import CheckError, MtlLoraError, UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.export.check_start import send, started
from mtl_lora_cli.export.comparison import (
    Comparison,
    Unrounded,
    compared,
    furthest,
    largest_difference,
)
from mtl_lora_cli.export.formats import FORMATS, Format, Reference, blamed
from mtl_lora_cli.export.low_rank import ask_at
from mtl_lora_cli.export.nudged import nudge
from mtl_lora_cli.export.questions import Questions, Scored
from mtl_lora_cli.export.shards import matrix_dtypes, read_shard
from mtl_lora_cli.machine.cards import free_memory, pick_device, release
from mtl_lora_cli.models.files import weight_files
from mtl_lora_cli.tasks.task import Task

# Largest difference of a candidate's log-probability, by what rounds: the arithmetic's dtype, or that of
# the written weights where they are coarser. In 16 bits sums reach it in tens of layers, on candidates that
# are far from likely; stored weights alone stay ten times below.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
_SAFETENSORS = "*.safetensors"
_TIMES = (
    3.0  # as far as one more rounding moves a model; merged and loaded by another program two do
)
_ASKED_AGAIN = 8  # rows
_BYTES_A_VALUE = 5  # of a model in float32, with what a pass takes


@dataclass(frozen=True)
class WrittenCheck:
    """What a written folder has to stand.

    Attributes:
        format: that it is in, by name.
        references: the run as it is compared with; the first is what the written one must equal, and of
            the others the distance is told.
        limit: examples to compare on.
        tolerance: largest difference of log-probabilities allowed; None: by dtype.
    """

    format: str
    references: Sequence[Reference]
    limit: int
    tolerance: float | None = None

    def request(self, run: Run, task: Task, folder: Path) -> dict[str, Any]:
        """What the other process needs to know, as JSON takes it."""
        where = {
            "run": str(run.folder.path.absolute()),
            "task": task.name,
            "folder": str(folder.absolute()),
        }
        return where | {"early": FORMATS[self.format].early} | asdict(self)

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> WrittenCheck:
        """The check that another process asks for."""
        references = [Reference(**one) for one in request["references"]]
        return cls(request["format"], references, request["limit"], request["tolerance"])

    def run(self, run: Run, task: Task, folder: Path) -> Comparison:
        """Compare what lies in a folder, in a new process.

        Raises:
            MtlLoraError: as the comparison does, or the process was killed.
        """
        with self.beside(run, task, folder) as compare:
            return compare()

    @contextmanager
    def beside(self, run: Run, task: Task, folder: Path) -> Iterator[Callable[[], Comparison]]:
        """Begin in a new process, which ends when this one does, with all that needs no written folder.

        Yields:
            To be called when the folder is written: it compares, and raises

            MtlLoraError: as the comparison does, or the process was killed.
        """
        with started() as process:
            send(process, json.dumps(self.request(run, task, folder)))
            yield partial(_answered, process)

    def compare(
        self, questions: Questions, folder: Path, written: Callable[[], object] = lambda: None
    ) -> Comparison:
        """Compare in this process.

        Args:
            questions: that the run and what is written are asked.
            folder: what is written.
            written: waits until it is.
        """
        kind = FORMATS[self.format]()
        first, *more = self.references
        judged = self.tolerance is None
        own, noise = answers_and_noise(first, questions, measured=judged)
        others = {first.label: own} | {one.label: answers_of(one, questions) for one in more}
        release(questions.run.device)  # before the next model comes
        if judged:
            with blamed(kind):
                kind.expect(questions, first)
        written()
        with blamed(kind):
            found = kind.read(questions, folder)
            unrounded = _unrounded(kind, questions, folder, first, own, found) if judged else None
        if self.tolerance is not None:
            allowed = self.tolerance
        elif unrounded is not None:
            allowed = TOLERANCE[questions.dtype]
        else:
            allowed = max(_allowed(questions, folder), _TIMES * (noise or 0.0))
        return compared(questions, found, others, allowed, unrounded=unrounded, noise=noise)


def _answered(process: Popen[str]) -> Comparison:
    """Tell the other process that the folder is written, and wait for what it says."""
    assert process.stdout is not None
    send(process, "written")
    text = process.stdout.read()
    process.wait()
    if not text:
        raise MtlLoraError(f"the check's process ended with code {process.returncode}")
    return received(json.loads(text))


def _unrounded(
    kind: Format,
    questions: Questions,
    folder: Path,
    reference: Reference,
    own: Scored,
    found: Scored,
) -> Unrounded | None:
    """Ask the rows that differ most again, with the rounding of the written weights taken back."""
    ask = kind.unrounded(questions, folder, reference)
    if ask is None:
        return None
    rows = furthest(own.scores, found.scores, _ASKED_AGAIN)
    gap = largest_difference(ask(rows), [own.scores[row] for row in rows])
    (coarsest, *_) = sorted(
        matrix_dtypes(weight_files(folder)), key=lambda dtype: -torch.finfo(dtype).eps
    )
    return Unrounded(len(rows), gap, str(coarsest).removeprefix("torch."))


def answers_and_noise(
    reference: Reference, questions: Questions, *, measured: bool
) -> tuple[Scored, float | None]:
    """`answers_of`, and what one more rounding moves them by, where it is `measured` and sums are in 16 bits."""
    if not measured or questions.dtype == torch.float32:
        return answers_of(reference, questions), None
    kind = reference.quantization or questions.run.quantization
    packed = questions.run.but(instead=None, quantization=kind).packed
    own = questions.ask(packed) if reference.rank is None else answers_of(reference, questions)
    before = questions.scores_of(packed)
    nudge(packed.model)
    return own, largest_difference(before, questions.scores_of(packed))


def answers_of(reference: Reference, questions: Questions) -> Scored:
    """What the run itself answers: as `eval` measures it, on other base weights, or at a lower rank."""
    if reference.rank is not None:
        return ask_at(questions, reference.rank, reference.quantization)
    kind = reference.quantization or questions.run.quantization
    return questions.ask(questions.run.but(instead=None, quantization=kind).packed)


def questions_about(
    folder: Path, run: Run, task: Task, limit: int, *, early: bool = False
) -> Questions:
    """What a check asks about what lies in a folder, or, `early`, about the safetensors that will.

    Sums in 16 bits differ by more than anything that writing does, so models compute in float32. In the
    run's dtype they do where they would not fit, where 8-bit products round anyhow, and where another
    program computes.
    """
    stored = early or any(folder.glob(_SAFETENSORS))
    exact = stored and _float32_tells_more(run)
    return Questions(run.but(in_float32=exact), task, Setting(limit=limit))


def _float32_tells_more(run: Run) -> bool:
    if run.dtype == torch.float32 or run.recipe.quantization == "int8":
        return False
    values = sum(
        math.prod(stored.shape)
        for path in weight_files(run.base.folder)
        for stored in read_shard(path)[0]
    )
    free, _ = free_memory(pick_device())
    return _BYTES_A_VALUE * values <= free


def _allowed(questions: Questions, folder: Path) -> float:
    rounding = {questions.dtype, *matrix_dtypes(sorted(folder.glob(_SAFETENSORS)))}
    return max(TOLERANCE.get(dtype, 0.0) for dtype in rounding)


def received(answer: Mapping[str, Any]) -> Comparison:
    """The comparison that the other process sent, or its error as our own."""
    if "comparison" in answer:
        return Comparison.from_json(answer["comparison"])
    if answer["code"] is None:
        error = RuntimeError(answer["error"])
        error.add_note(answer["traceback"])
        raise error
    kinds = {kind.exit_code: kind for kind in (MtlLoraError, UsageError, CheckError)}
    raise kinds[answer["code"]](answer["error"])
