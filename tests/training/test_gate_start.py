"""Why the gate must not start equal: equal up-projections never part."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch

from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.adapters.methods.base import Settings

from ..often import often

pytestmark = pytest.mark.slow


def mean_cosine(small: Callable[..., Any], config: Settings) -> float:
    """Mean cosine of two up-projections of a layer after 100 steps on four real tasks."""
    run = small(
        adapter=config,
        steps=100,
        learning_rate=3e-4,
        rows_per_step=1,
        row_length=128,
        checkpoint_every=None,
    ).train()
    cosines = [
        torch.cosine_similarity(one.flatten(), two.flatten(), dim=0).item()
        for layer in run.trainer.adapter.layers.values()
        for one, two in combinations(layer.lora_B.detach().double(), 2)
    ]
    assert len(cosines) == 20 * 3
    return sum(cosines) / len(cosines)


def test_an_equal_start_keeps_the_up_projections_copies(small: Callable[..., Any]) -> None:
    assert mean_cosine(small, configure(gate_start=1e-8)) > 0.9999


@pytest.mark.parametrize("gate", often(["weights", "embedding"], ["weights"]))
def test_the_default_start_parts_them(small: Callable[..., Any], gate: Any) -> None:
    assert mean_cosine(small, configure(gate=gate)) < 0.9
