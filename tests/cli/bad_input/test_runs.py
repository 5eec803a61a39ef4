"""Runs that are not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .mistakes import Bad

CASES = [
    Bad(
        "no run yet: eval",
        (
            "no run yet in runs; start one with: mtl-lora train RECIPE, or name one with --run",
        ),
        ("eval", "--task", "color"),
    ),
    Bad(
        "no run yet: merge",
        (
            "no run yet in runs; start one with: mtl-lora train RECIPE, or name one with --run",
        ),
        ("merge", "--task", "color"),
    ),
    Bad(
        "no run yet: train --resume",
        (
            "no run yet in runs; start one with: mtl-lora train RECIPE, or name one with --run",
        ),
        ("train", "--resume"),
    ),
    Bad(
        "no run yet: report",
        (
            "no run yet in runs; start one with: mtl-lora train RECIPE, or name one with --run",
        ),
        ("report",),
    ),
    Bad(
        "unknown run",
        ("no run 'smal' in RUNS; did you mean 'small'?; runs: small",),
        ("eval", "--task", "warm", "--run", "smal", "--runs", "RUNS"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Bad, refused: Callable[[Bad], None]) -> None:
    refused(case)
