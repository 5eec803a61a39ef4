"""Shared fixtures: where the real data and the tiny real model lie, if they are here."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

# Triton reads it when it is imported, which other libraries do, too: without a card its kernels run
# in the interpreter (tests/kernels).
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """A shell that runs the tests in the background has made Ctrl-C ignored: tests send it, and wait."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first: at the end no process then waits for another one's long file."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def _shared(variable: str, default: Path, what: str) -> Path:
    folder = Path(os.environ.get(variable, default))
    if not folder.is_dir():
        pytest.skip(f"{what} not found at {folder}; set {variable} to its folder")
    return folder


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """GLUE, commonsense and ad data as gzipped JSON lines (see docs/real-data.md)."""
    return _shared("MTL_LORA_DATA", REPOSITORY.parent / "shared" / "data", "the real data")


@pytest.fixture(scope="session")
def stories_folder() -> Path:
    """A trained LLaMA-architecture model of 260 thousand parameters."""
    default = REPOSITORY.parent / "shared" / "models" / "stories260k"
    return _shared("MTL_LORA_STORIES", default, "the model stories260k")
