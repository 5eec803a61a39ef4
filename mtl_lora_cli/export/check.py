"""The check after writing: the written model against the adapted one, on the task's own rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.evaluation.choices import build_requests, score
from mtl_lora_cli.evaluation.evaluate import Setting, held_out
from mtl_lora_cli.evaluation.open_run import OpenRun
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.tasks.task import Task

# Largest difference of a candidate's log-probability, and least share of equal answers. The first
# follows from the dtype's rounding through tens of layers, the second from near ties.
TOLERANCE = {torch.float32: (1e-3, 1.0), torch.bfloat16: (0.5, 0.97), torch.float16: (0.1, 0.98)}


@dataclass(frozen=True)
class Comparison:
    """How far two models are apart on the same requests.

    Attributes:
        examples: number of them.
        largest: largest difference of any candidate's log-probability.
        equal: share of examples with the same answer.
        allowed: what `largest` and `equal` had to be.
    """

    examples: int
    largest: float
    equal: float
    allowed: tuple[float, float]

    @property
    def holds(self) -> bool:
        """Whether the two agree within tolerance; NaN never does."""
        return self.largest <= self.allowed[0] and self.equal >= self.allowed[1]


def compare_merged(
    opened: OpenRun, task: Task, folder: Path, limit: int, tolerance: float | None = None
) -> Comparison:
    """Load a merged folder as any user would and compare it with the adapted model."""
    merged = load_model(find_base_model(str(folder)), dtype=opened.dtype, device=opened.device)
    return compare(opened, task, PackedModel(merged), limit, tolerance)


def compare(
    opened: OpenRun, task: Task, other: PackedModel, limit: int, tolerance: float | None = None
) -> Comparison:
    """Put the same requests to the adapted model and to another one that should equal it.

    Args:
        opened: the run, on the base weights of the other model.
        task: which the other model is for.
        other: the exported model.
        limit: examples to compare on.
        tolerance: largest difference allowed; default: by dtype.
    """
    examples = held_out(task, Setting(limit=limit)).examples
    encoder = Encoder(opened.tokenizer, opened.recipe.prompt_format)
    requests = build_requests(examples, task.id, encoder, opened.longest)
    ours, theirs = (
        score(model, requests, device=opened.device, tokens_per_pass=opened.tokens_per_pass)
        for model in (opened.packed, other)
    )
    largest = max(
        (float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)), default=0.0
    )
    if any(not np.isfinite(values).all() for values in [*ours, *theirs]):
        largest = float("nan")
    equal = np.mean([a.argmax() == b.argmax() for a, b in zip(ours, theirs, strict=True)])
    allowed = TOLERANCE[opened.dtype]
    if tolerance is not None:
        allowed = (tolerance, allowed[1])
    return Comparison(len(examples), largest, float(equal), allowed)
