"""The command as a user runs it, for things that a file of the user's own adds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..forks import Forks

LOADED = ("torch", "transformers", "mtl_lora_cli.training.run", "mtl_lora_cli.export.write")


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Each command is a process of its own, which knows of an extension by what the user wrote alone."""
    cache: Path = tmp_path_factory.mktemp("cache")
    settled = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MTL_LORA_CACHE": str(cache)}
    forks = Forks(*LOADED, environment={**os.environ, **settled})
    yield forks
    forks.close()
