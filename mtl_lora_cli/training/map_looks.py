"""What a run's maps come to on held-out pictures while it learns: at the size at which they are learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch

from mtl_lora_cli.data.map_batch import SeenBatch
from mtl_lora_cli.evaluation.maps import MapHost, at_size, outcome_of_tallies
from mtl_lora_cli.machine.processes import Processes
from mtl_lora_cli.metrics.declare import find
from mtl_lora_cli.metrics.tallies import tally_of
from mtl_lora_cli.models.host import Batch, Host
from mtl_lora_cli.tasks.maps import MapSpec, spec_of
from mtl_lora_cli.tasks.task import Task


@torch.no_grad()
def map_values(
    host: Host,
    batches: Sequence[Batch],
    tasks: Sequence[Task],
    metrics: Sequence[str | None],
    device: torch.device,
    processes: Processes,
) -> dict[str, float | None]:
    """Task → the value of its metric on these pictures; None where it is undefined.

    Args:
        host: what answers.
        batches: this process's share of the pictures, with their maps.
        tasks: of the run.
        metrics: of each; None: it is not measured.
        device: where the host is.
        processes: over whom the pictures are shared.
    """
    specs = [spec_of(task.template) for task in tasks]
    own: list[list[np.ndarray]] = [[] for _ in tasks]
    for batch in cast(Sequence[SeenBatch], batches):
        for place, tally in _tallies(host, batch, specs, device):
            own[place].append(tally)
    every: list[list[np.ndarray]] = [[] for _ in tasks]
    for part in processes.gather(own):
        for place, tallies in enumerate(part):
            every[place] += tallies
    found: dict[str, float | None] = {}
    for task, name, tallies in zip(tasks, metrics, every, strict=True):
        if name is not None and tallies:
            outcome, metric = outcome_of_tallies(tallies), find(name)
            found[task.name] = None if metric.undefined(outcome) else metric.value(outcome)
    return found


def _tallies(
    host: Host, batch: SeenBatch, specs: Sequence[MapSpec], device: torch.device
) -> Iterator[tuple[int, np.ndarray]]:
    """Task and tally of each map of a batch."""
    tasks, right = batch.task_ids.tolist(), batch.to(torch.device("cpu")).targets
    answers: Any = cast(MapHost, host).answers(batch.to(device), tasks)
    for task in tasks:
        spec, target = specs[task], right[task].numpy()
        count = tally_of(spec.objective, spec.channels)
        for picture in batch.present[:, task].nonzero().flatten().tolist():
            truth = target[picture]
            truth = truth.transpose(1, 2, 0) if truth.ndim == 3 else truth
            raw = answers[task][picture].cpu()
            if bool(torch.isfinite(raw).all()):
                yield task, count(truth, at_size(raw, spec, (truth.shape[0], truth.shape[1])))
