"""The check after writing: what was written against the run, on held-out rows of its task.

It runs in a process of its own (`check_process.py`), which loads the files as any user would. What is
compared are `Reader`s: functions that load one model and put the check's questions to it, one model
after the other. They travel to that process by name, so they stand at the top of a module.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.prepare import Examples
from mtl_lora_cli.errors import CheckError, MtlLoraError, UsageError
from mtl_lora_cli.evaluation.answers import (
    answer,
    answer_limits,
    outcome_of,
    read_generated,
    stop_of,
)
from mtl_lora_cli.evaluation.choices import Request, build_requests, score
from mtl_lora_cli.evaluation.evaluate import held_out
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.protocols import CHOICES, Setting
from mtl_lora_cli.export.alone import generate_alone, load_alone, score_alone
from mtl_lora_cli.export.shards import matrix_dtypes, read_shard
from mtl_lora_cli.machine.cards import free_memory, pick_device
from mtl_lora_cli.metrics import Outcome
from mtl_lora_cli.metrics.intervals import Measured, measure
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.files import weight_files
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.tasks.task import Task

# Largest difference of a candidate's log-probability, by what rounds: the arithmetic's dtype, or that of
# the written weights where they are coarser. In 16 bits sums reach it in tens of layers, on candidates that
# are far from likely; stored weights alone stay ten times below.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
_SAFETENSORS = "*.safetensors"
_BYTES_A_VALUE = 5  # of a model in float32, with what a pass takes
# Where so little is allowed, predictions must be equal, too. Where more is, candidates nearer to each
# other fall either way, and how many rows have such ones is the task's matter, not the writer's.
_PREDICTIONS_EQUAL = 1e-2


@dataclass(frozen=True)
class Answers:
    """What one model says to a check's questions.

    Attributes:
        scores: of each example the log-probability of every candidate, float64 [choices]; a free
            answer is its example's only candidate.
        outcome: predictions by the task's protocol; None where they cannot be had.
    """

    scores: list[np.ndarray]
    outcome: Outcome | None


@dataclass(frozen=True)
class Questions:
    """What a check asks every model.

    Attributes:
        run: whose task it is, computing as all models shall.
        task: which one.
        setting: how the rows are read and scored.
    """

    run: Run
    task: Task
    setting: Setting

    @property
    def dtype(self) -> torch.dtype:
        """In which models compute."""
        return self.run.dtype

    def load_alone(self, folder: Path, quantization: str = "none") -> Any:
        """A transformers folder as any user has it, see `ask_alone`."""
        run = self.run
        return load_alone(
            folder, run.weight_dtype, quantization=quantization, in_float32=run.in_float32
        )

    @cached_property
    def examples(self) -> Examples:
        """The held-out rows."""
        return held_out(self.task, self.setting)

    @cached_property
    def requests(self) -> list[Request]:
        """The rows as they are asked."""
        return self._requests()

    @cached_property
    def encoder(self) -> Encoder:
        """As the run encodes."""
        return Encoder.of(self.run.tokenizer, self.run.recipe, lenient=True)

    def _requests(self, new_tokens: int | None = None) -> list[Request]:
        rows = self.encoder.control_tokens.mark(self.task, self.examples).examples
        return build_requests(
            rows,
            self.task.id,
            self.encoder,
            self.run.longest,
            new_tokens=new_tokens or 0,
            generated=new_tokens is not None,
        )

    def ask(self, packed: PackedModel) -> Answers:
        """Put them to a model in this process."""
        opened = self.run.but(instead=packed)
        (own,) = answer(opened, [self.task], [self.examples], self.setting)
        if own.scores is not None:
            return Answers(own.scores, own.outcome)
        # Free answers were generated; these are the log-probabilities of the right ones.
        tokens = opened.tokens_per_pass
        scores = score(packed, self.requests, device=opened.device, tokens_per_pass=tokens)
        return Answers(scores, own.outcome)

    def ask_alone(self, model: Any) -> Answers:
        """Put them to a model of transformers', or of PEFT's on it, and to none of our own code."""
        scores = score_alone(model, self.requests)
        if self.setting.protocol_of(self.task) == CHOICES:
            return self.answers(scores)
        room = self.task.template.generate.max_new_tokens or 0
        requests = self._requests(room)
        answers = generate_alone(
            model,
            requests,
            ends=self.encoder.stops,
            new_tokens=answer_limits(self.task, requests),
            stopped=stop_of(self.task, self.encoder, self.run.tokenizer),
        )
        said = read_generated(
            self.run.tokenizer, self.encoder, self.task, self.examples, requests, answers
        )
        return Answers(scores, said.outcome)

    def answers(self, scores: list[np.ndarray]) -> Answers:
        """What log-probabilities alone tell: the predictions, too, unless answers are free."""
        if self.task.template.choices is None:
            return Answers(scores, None)
        how = self.setting.normalisation_of(self.task)
        return Answers(scores, outcome_of(self.task, self.examples, scores, self.requests, how))


Reader = Callable[[Questions, Path], Answers]  # the questions, and the folder that was written


def run_itself(questions: Questions, folder: Path) -> Answers:
    """The run's adapter on its own base weights, quantised ones included, as `eval` measures it."""
    return questions.ask(questions.run.but(instead=None).packed)


def run_on_original(questions: Questions, folder: Path) -> Answers:
    """The run's adapter on the full-precision base weights."""
    return questions.ask(questions.run.but(quantization="none").packed)


def merged_model(questions: Questions, folder: Path) -> Answers:
    """A transformers folder, loaded and asked as any user would."""
    return questions.ask_alone(questions.load_alone(find_base_model(str(folder)).folder))


@dataclass(frozen=True)
class Check:
    """What a written folder has to stand.

    Attributes:
        written: loads it.
        models: label → another model; the first is the reference, which the written one must equal,
            and of the others the distance is told.
        limit: examples to compare on.
        tolerance: largest difference of log-probabilities allowed; None: by dtype.
    """

    written: Reader
    models: Mapping[str, Reader]
    limit: int
    tolerance: float | None = None

    def request(self, run: Run, task: Task, folder: Path) -> dict[str, Any]:
        """What the other process needs to know, as JSON takes it."""
        return {
            "run": str(run.folder.path.absolute()),
            "task": task.name,
            "folder": str(folder.absolute()),
            "written": _name(self.written),
            "models": {label: _name(reader) for label, reader in self.models.items()},
            "limit": self.limit,
            "tolerance": self.tolerance,
        }

    def run(self, run: Run, task: Task, folder: Path) -> Comparison:
        """Compare in a new process, which ends when this one does.

        Raises:
            MtlLoraError: as the comparison does, or the process was killed.
        """
        # -P: a folder of the user's that is called like a library must not be imported.
        module = "mtl_lora_cli.export.check_process"
        request = json.dumps(self.request(run, task, folder))
        call = [sys.executable, "-P", "-m", module, request]
        pipe = subprocess.PIPE
        with subprocess.Popen(call, stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdout is not None
            text = process.stdout.read()
            process.wait()
        if not text:
            raise MtlLoraError(f"the check's process ended with code {process.returncode}")
        return received(json.loads(text))

    def compare(self, questions: Questions, folder: Path) -> Comparison:
        """Compare in this process."""
        written = self.written(questions, folder)
        others = {label: reader(questions, folder) for label, reader in self.models.items()}
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
            allowed=_allowed(questions, folder) if self.tolerance is None else self.tolerance,
            titles={n: questions.task.template.title(n) for n in questions.task.template.metrics},
        )


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
class Comparison:
    """How a written model compared.

    Attributes:
        split, examples: which held-out rows, and how many of them.
        dtype: that all models computed in, whatever their weights are stored in.
        metrics: the written model's scores.
        models: label → another model; the reference first.
        allowed: what the reference's `largest` may be.
        titles: metrics as tables show them, where that is not their name.
    """

    split: str
    examples: int
    dtype: str
    metrics: Mapping[str, Measured]
    models: Mapping[str, Distance]
    allowed: float
    titles: Mapping[str, str] = field(default_factory=dict)

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
        return self.largest <= self.allowed and (self.equal == 1 or not self.predictions_count)

    @property
    def predictions_count(self) -> bool:
        """Whether the predictions have to be equal, too."""
        return self.allowed <= _PREDICTIONS_EQUAL

    @property
    def asked(self) -> str:
        """What had to hold, in words."""
        predictions = " and in all predictions" if self.predictions_count else ""
        return f"to {self.allowed:g} in log-probabilities{predictions}"

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Comparison:
        """The inverse of `dataclasses.asdict`."""
        models = {
            label: Distance(_metrics(found["metrics"]), found["largest"], found["equal"])
            for label, found in content["models"].items()
        }
        return cls(**{**content, "metrics": _metrics(content["metrics"]), "models": models})


def check_of(request: Mapping[str, Any]) -> Check:
    """The check that another process asks for."""
    return Check(
        _reader(request["written"]),
        {label: _reader(name) for label, name in request["models"].items()},
        request["limit"],
        request["tolerance"],
    )


def questions_about(folder: Path, run: Run, task: Task, limit: int) -> Questions:
    """What a check asks about what lies in a folder.

    Sums in 16 bits differ by more than anything that writing does, so models compute in float32. In the
    run's dtype they do where they would not fit, where 8-bit products round anyhow, and where another
    program computes.
    """
    exact = _float32_tells_more(run, folder)
    return Questions(run.but(in_float32=exact), task, Setting(limit=limit))


def _float32_tells_more(run: Run, folder: Path) -> bool:
    if run.dtype == torch.float32 or run.recipe.quantization == "int8":
        return False
    if not any(folder.glob(_SAFETENSORS)):
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


def _name(reader: Reader) -> str:
    return f"{reader.__module__}:{reader.__qualname__}"  # type: ignore[attr-defined]


def _reader(name: str) -> Reader:
    module, _, function = name.partition(":")
    found: Reader = getattr(import_module(module), function)
    return found


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


def _measured(task: Task, answers: Answers) -> dict[str, Measured]:
    if answers.outcome is None:
        return {}
    return {name: measure(name, answers.outcome) for name in task.template.metrics}


def _metrics(content: Mapping[str, Any]) -> dict[str, Measured]:
    return {name: Measured(**measured) for name, measured in content.items()}


def largest_difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Largest difference; NaN where a log-probability is no finite number."""
    if not all(np.isfinite(values).all() for values in [*ours, *theirs]):
        return float("nan")
    return max((float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _equal(ours: Answers, theirs: Answers) -> float:
    """Share of equal predictions; of likeliest candidates where there are no predictions."""
    if ours.outcome is not None and theirs.outcome is not None:
        return float(np.mean(ours.outcome.predicted == theirs.outcome.predicted))
    pairs = zip(ours.scores, theirs.scores, strict=True)
    return float(np.mean([a.argmax() == b.argmax() for a, b in pairs]))
