"""What inspect refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .mistakes import Bad

CASES = [
    Bad(
        "inspect of a run with no finished adapter",
        ("run 'half' has no finished adapter; finish it with: …",),
        ("inspect", "--run", "half"),
        {"runs/half/recipe.yaml": "RUNS/small/recipe.yaml"},
    ),
    Bad(
        "a picture of a kind that cannot be written",
        ("--output: expected a file ending in …",),
        ("inspect", "--runs", "RUNS", "--output", "adapter.txt"),
        early=False,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Bad, refused: Callable[[Bad], None]) -> None:
    refused(case)
