"""The hub is touched on request and never otherwise; where it cannot be had, nothing else happens."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

Invoke = Callable[..., subprocess.CompletedProcess[str]]

# Whoever looks up a name or connects to an address of the internet leaves a line in a file, and has
# no network. The checking process, too: Python reads this at its start.
WATCHED = """\
import os
import socket


def _told(*arguments, **keys):
    with open(os.environ["WATCHED"], "a") as file:
        print(*arguments, file=file)
    raise OSError("no network here")


socket.getaddrinfo = socket.create_connection = _told
_connect = socket.socket.connect
socket.socket.connect = lambda self, address: (
    _connect(self, address) if self.family == socket.AF_UNIX else _told(address)
)
"""


@pytest.fixture
def reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Who was asked for by this process and by those that it starts: a line each."""
    import socket

    for owner, name in (
        (socket, "getaddrinfo"),
        (socket, "create_connection"),
        (socket.socket, "connect"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # so that it is put back
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WATCHED, encoding="utf-8")
    told = tmp_path / "reached"
    told.write_text("")
    paths = [str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("WATCHED", str(told))
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    exec(WATCHED, {})
    return told


@pytest.fixture
def merge(
    invoke: Invoke, small_run: tuple[Path, object], monkeypatch: pytest.MonkeyPatch
) -> Invoke:
    """The command with the hub's own switch off, so that nothing else holds it back."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    run = str(small_run[0])
    return lambda *more: invoke("merge", "--task", "warm", "--run", run, "--limit", "2", *more)


def test_without_push_no_network_is_touched(merge: Invoke, reached: Path, tmp_path: Path) -> None:
    finished = merge("--output", "out")
    assert finished.returncode == 0, finished.stderr
    assert reached.read_text() == ""
    assert (tmp_path / "out" / "README.md").is_file()


def test_a_hub_out_of_reach_is_one_line_and_nothing_is_written(
    merge: Invoke, reached: Path, tmp_path: Path
) -> None:
    finished = merge("--output", "out", "--push", "me/it")
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: --push me/it: the hub cannot be had: ")
    assert finished.stdout == ""
    assert "huggingface.co" in reached.read_text()
    assert not (tmp_path / "out").exists()
