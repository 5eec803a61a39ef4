"""The command as a user runs it, and one run that the tests share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ..forks import Ended, Forks

STEPS = 100
DROPPED = {"MTL_LORA_RUNS", "PYTHONUNBUFFERED"}  # the caller's own settings
LOADED = ("mtl_lora_cli.training.run", "mtl_lora_cli.export.write", "transformers.models.llama")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of all commands."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def warm(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Commands as processes of their own, one thread each, no network, libraries loaded already."""
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
    settled = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MTL_LORA_CACHE": str(tmp_path_factory.mktemp("cache")),
        "MTL_LORA_DATA": str(data_folder.resolve()),
    }
    # With a card a library may open it while it is loaded, and a fork cannot open it again.
    forks = Forks(*(() if torch.cuda.is_available() else LOADED), environment={**kept, **settled})
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def command(workplace: Path, warm: Forks) -> Callable[..., Ended]:
    """`command(*arguments)` runs a process that must end well."""

    def run(*arguments: str) -> Ended:
        ended = warm.run(*arguments, cwd=workplace, seconds=600)
        assert ended.returncode == 0, ended.stderr
        return ended

    return run


@pytest.fixture(scope="session")
def real_run(
    command: Callable[..., Ended], workplace: Path, stories_folder: Path
) -> tuple[Path, float]:
    """A hundred steps of the recipe `real-small` on the small model and our rows, and the seconds they took."""
    started = time.monotonic()
    command(
        "train",
        "real-small",
        f"base_model={stories_folder.resolve()}",
        f"training.max_steps={STEPS}",
        "training.epochs=2",
        "run.name=real",
    )
    return workplace / "runs" / "real", time.monotonic() - started
