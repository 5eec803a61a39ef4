"""A made-up row that is as full as a run's, so that its kernels are the run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_lora_cli.recipe.training import Training
from mtl_lora_cli.training.rehearsed import begin, made_up


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    ("loss_on", "length", "rows", "tasks"), [("answer", 512, 1, 3), ("all", 96, 2, 1)]
)
def test_a_made_up_pass_is_a_whole_one(
    loss_on: Any, length: int, rows: int, tasks: int, share: bool
) -> None:
    training = Training(
        row_length=length,
        rows_per_pass=rows,
        rows_per_step=rows,
        loss_on=loss_on,
        share_beginnings=share,
    )
    batch = made_up(training, tasks)
    assert batch.input_ids.numel() == rows * length
    assert (batch.segments.reach is not None) == share
    present = batch.task_ids.unique()
    assert set(present.tolist()) - {-1} == set(range(tasks))
    assert len(batch.positions) % 16 == 0, "round, as a run's"


def test_on_a_cpu_nothing_is_begun(tmp_path: Path) -> None:
    nobody: Any = None
    begin(nobody, nobody, [], torch.float32, torch.device("cpu"))()
