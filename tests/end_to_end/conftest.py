"""The command as a user runs it, and one run on real data that the tests share."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Finished = subprocess.CompletedProcess[str]

STEPS = 100
DROPPED = {"MTL_LORA_RUNS", "PYTHONUNBUFFERED"}  # the caller's own settings


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of all commands."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def command(
    workplace: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Finished]:
    """`command(*arguments)` runs a process that must end well, one thread, no network."""
    settled = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MTL_LORA_CACHE": str(tmp_path_factory.mktemp("cache")),
        "MTL_LORA_DATA": str(data_folder.resolve()),
    }

    def run(*arguments: str) -> Finished:
        kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
        finished = subprocess.run(
            [sys.executable, "-m", "mtl_lora_cli.cli.main", *arguments],
            cwd=workplace,
            env={**kept, **settled},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        return finished

    return run


@pytest.fixture(scope="session")
def real_run(
    command: Callable[..., Finished], workplace: Path, stories_folder: Path
) -> tuple[Path, float]:
    """A hundred steps of the recipe `real-small` on the tiny model, and the seconds they took."""
    started = time.monotonic()
    command(
        "train",
        "real-small",
        f"base_model={stories_folder.resolve()}",
        f"training.max_steps={STEPS}",
        "run.name=real",
    )
    return workplace / "runs" / "real", time.monotonic() - started
