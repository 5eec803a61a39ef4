"""Folders of the tiny models, and the table that a run of the matrix ends with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from .build import build
from .models import Tiny
from .results import Result, table

RESULTS = pytest.StashKey[dict[str, Result]]()


@pytest.fixture(scope="session")
def folder_of(
    stories_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Tiny], Path]:
    """`folder_of(model)`: where the tiny model lies; it is made once."""
    made: dict[str, Path] = {}
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def find(model: Tiny) -> Path:
        if str(model) not in made:
            folder = tmp_path_factory.mktemp("family") / str(model)
            made[str(model)] = build(model, stories_folder, folder)
        return made[str(model)]

    return find


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Result], None]:
    """Keeps a result for the table at the end."""
    results = request.config.stash.setdefault(RESULTS, {})

    def keep(result: Result) -> None:
        results[str(result.model)] = result

    return keep


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash.get(RESULTS, {})
    if results:
        terminalreporter.section("model families")
        for line in table(list(results.values())):
            terminalreporter.write_line(line)
