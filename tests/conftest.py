"""Shared fixtures: a small model and rows of our own, and the real data where they are."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mtl_lora_cli import extensions
from mtl_lora_cli.adapters.methods import METHODS
from mtl_lora_cli.export.formats import FORMATS
from mtl_lora_cli.metrics import METRICS

from .forks import Call, Ended, Forks

# Triton reads it when it is imported, which other libraries do, too: without a card its kernels run
# in the interpreter (tests/kernels).
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

REPOSITORY = Path(__file__).resolve().parent.parent
FIXTURES = REPOSITORY / "tests" / "fixtures"
# Fixtures that train a model or start processes: `make quick` leaves out what asks for them.
SLOW = {"small_run", "fresh_run", "command", "started", "train", "trained", "four_bit_run"}


def pytest_configure(config: pytest.Config) -> None:
    """One thread, as `make test` has it, but for what is timed.

    A shell that runs the tests in the background has made Ctrl-C ignored: tests send it, and wait.
    """
    if "OMP_NUM_THREADS" not in os.environ and not any("benchmarks" in one for one in config.args):
        torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _real_data() -> Path:
    """Where the real data lie, if they are here; docs/real-data.md says what they are."""
    return Path(os.environ.get("MTL_LORA_DATA", REPOSITORY.parent / "shared" / "data"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests go first: at the end no process then waits for another one's long file.

    What says something of the real data alone is left out where they are not.
    """
    for item in items:
        if SLOW.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not _real_data().is_dir():
        real = [item for item in items if item.get_closest_marker("real_data")]
        config.hook.pytest_deselected(items=real)
        items[:] = [item for item in items if not item.get_closest_marker("real_data")]


@pytest.fixture(autouse=True)
def _nothing_added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a file of a test's adds to what is built in is taken away again."""
    known = [(registry, dict(registry)) for registry in (METRICS, FORMATS)]
    monkeypatch.setattr(METHODS, "_known", dict(METHODS))
    monkeypatch.setattr(extensions, "_run", set())
    monkeypatch.setenv(extensions.VARIABLE, "")
    yield
    for registry, before in known:
        registry.clear()
        registry.update(before)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Rows of our own in the forms of GLUE, the commonsense collection and ads, as gzipped JSON lines."""
    return FIXTURES / "data"


@pytest.fixture(scope="session")
def real_data_folder() -> Path:
    """The real ones, for tests that are marked `real_data`."""
    return _real_data()


@pytest.fixture(scope="session", params=["own", pytest.param("real", marks=pytest.mark.real_data)])
def each_data_folder(request: pytest.FixtureRequest) -> Path:
    """Both, one after the other, for what has to be so in either."""
    return FIXTURES / "data" if request.param == "own" else _real_data()


@pytest.fixture(scope="session")
def small_model() -> Path:
    """A trained LLaMA-architecture model of 260 thousand parameters, made by tests/fixtures."""
    return FIXTURES / "model"


@pytest.fixture(scope="session")
def stories_folder(small_model: Path) -> Path:
    """The same under its first name."""
    return small_model


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Commands as processes of their own, which have the libraries."""
    cache = str(tmp_path_factory.mktemp("cache"))
    environment = {**os.environ, "MTL_LORA_CACHE": cache, "OMP_NUM_THREADS": "1"}
    process = Forks("torch", "transformers", "mtl_lora_cli.training.run", environment=environment)
    yield process
    process.close()


@pytest.fixture(scope="module")
def call(forks: Forks, place: Path) -> Call:
    """A command in the folder that a module's own `place` is, and how it ended: as expected."""

    def run(*arguments: str, code: int = 0) -> Ended:
        ended = forks.run(*arguments, cwd=place)
        assert ended.returncode == code, ended.stderr
        return ended

    return run
