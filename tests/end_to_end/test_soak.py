"""A kill in a checkpoint write, and three at any moment; `make soak` does twenty."""

from __future__ import annotations

from pathlib import Path

import pytest

from .soak import soak


@pytest.mark.slow
@pytest.mark.long  # tests/training/test_resume.py stops runs and goes on with them, bit for bit
@pytest.mark.parametrize("kills", [1, 3])
def test_a_run_that_is_killed_is_the_run_that_is_not(
    tmp_path: Path, data_folder: Path, stories_folder: Path, kills: int
) -> None:
    told: list[str] = []
    verdict = soak(tmp_path, data_folder, stories_folder, kills=kills, tell=told.append)
    assert len(verdict.kills) == len(told) == kills
    assert verdict.kills[0].writing, told
    assert verdict.same_adapter, told
    assert verdict.same_metrics, told
