"""What a check asks of every model: held-out rows of a task, and how each kind of model is asked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.evaluation.answers import answer, answer_limits, read_generated, stop_of
from mtl_lora_cli.evaluation.asked import Stopped
from mtl_lora_cli.evaluation.choices import score
from mtl_lora_cli.evaluation.evaluate import held_out
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.protocols import CHOICES, Setting
from mtl_lora_cli.evaluation.requests import Request, build_requests
from mtl_lora_cli.evaluation.scored import have_numbers, outcome_of
from mtl_lora_cli.export.alone import generate_alone, load_alone, score_alone
from mtl_lora_cli.metrics import Outcome
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.tasks.task import Task


@dataclass(frozen=True)
class Scored:
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

    def ask(self, packed: PackedModel) -> Scored:
        """Put them to a model in this process."""
        opened = self.run.but(instead=packed)
        (own,) = answer(opened, [self.task], [self.examples], self.setting)
        if own.scores is not None:
            return Scored(own.scores, own.outcome)
        # Free answers were generated; these are the log-probabilities of the right ones.
        return Scored(self.scores_of(packed), own.outcome)

    def scores_of(self, packed: PackedModel) -> list[np.ndarray]:
        """The log-probabilities alone, of a model in this process."""
        run = self.run.but(instead=packed)
        tokens = run.tokens_per_pass
        return score(packed, self.requests, device=run.device, tokens_per_pass=tokens)

    def ask_alone(self, model: Any) -> Scored:
        """Put them to a model of transformers', or of PEFT's on it, and to none of our own code."""
        scores = score_alone(model, self.requests)
        if not self.free:
            return self.answers(scores)
        answers = generate_alone(
            model,
            self.prompts,
            ends=self.encoder.stops,
            new_tokens=self.limits,
            stopped=self.stopped,
        )
        return self.read(scores, answers)

    @property
    def free(self) -> bool:
        """Whether answers are generated."""
        return self.setting.protocol_of(self.task) != CHOICES

    @cached_property
    def prompts(self) -> list[Request]:
        """Where answers are free: the rows with room for one."""
        return self._requests(self.task.template.generate.max_new_tokens or 0)

    @property
    def limits(self) -> list[int]:
        """The most tokens of each free answer."""
        return answer_limits(self.task, self.prompts)

    @property
    def stopped(self) -> Stopped:
        """Whether a free answer is complete as it stands."""
        return stop_of(self.task, self.encoder, self.run.tokenizer)

    def read(self, scores: list[np.ndarray], answers: list[list[int]]) -> Scored:
        """What free answers say, beside the log-probabilities of the right ones."""
        said = read_generated(
            self.run.tokenizer, self.encoder, self.task, self.examples, self.prompts, answers
        )
        return Scored(scores, said.outcome)

    def answers(self, scores: list[np.ndarray]) -> Scored:
        """What log-probabilities alone tell: the predictions, too, unless answers are free."""
        if self.task.template.choices is None or not have_numbers(scores):  # which never holds
            return Scored(scores, None)
        how = self.setting.normalisation_of(self.task)
        return Scored(scores, outcome_of(self.task, self.examples, scores, self.requests, how))
