"""A tiny case and a way to measure it that takes a moment on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mtl_lora_cli.bench.case import Measuring
from mtl_lora_cli.bench.cases import Case
from mtl_lora_cli.bench.shapes import projections
from mtl_lora_cli.machine.rate import Rate


@pytest.fixture
def tiny() -> Case:
    adapter = {
        "method": "mtl-lora",
        "rank": 8,
        "alpha": 16.0,
        "up_projections": 3,
        "target_modules": projections("tiny")["qkvo"],
    }
    return replace(Case("tiny", "tiny", adapter), row_length=512, rows_per_step=2).named()


@pytest.fixture
def measuring() -> Measuring:
    rate = Rate("made up", measured=1e11, known=None)
    return Measuring(torch.device("cpu"), rate, steps=2, warmup=1, breakdown=False, seed=0)
