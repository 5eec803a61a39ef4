"""Three kills, one of them in a checkpoint write; `make soak` does twenty."""

from __future__ import annotations

from pathlib import Path

import pytest

from .soak import soak


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_is_the_run_that_is_not(
    tmp_path: Path, data_folder: Path, stories_folder: Path
) -> None:
    told: list[str] = []
    verdict = soak(tmp_path, data_folder, stories_folder, kills=3, tell=told.append)
    assert len(verdict.kills) == len(told) == 3
    assert verdict.kills[0].writing, told
    assert verdict.same_adapter, told
    assert verdict.same_metrics, told
