"""One writer of a run at a time, by a lock that ends with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

import pytest

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.runs.lock import LOCK_FILE, in_turn, only_writer, require_idle, writer_of

HOLDER = """\
import sys, time
from pathlib import Path
from threading import Timer
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.runs.lock import only_writer
with only_writer(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "mine").mkdir()
    return RunFolder(tmp_path / "mine")


@contextmanager
def another(run: RunFolder) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes into the run until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.communicate()


def test_another_process_is_named_and_nothing_is_touched(run: RunFolder) -> None:
    assert writer_of(run) is None
    with another(run) as process:
        assert writer_of(run) == f"process {process.pid}"
        said = (run.path / LOCK_FILE).read_text()
        message = f"run 'mine' is being trained by process {process.pid}; wait for it, or stop it"
        with pytest.raises(UsageError, match=message), only_writer(run):
            raise AssertionError("two writers")
        with pytest.raises(UsageError, match=message):
            require_idle(run)
        assert (run.path / LOCK_FILE).read_text() == said
    assert list(run.path.iterdir()) == []
    with only_writer(run):
        assert writer_of(run) == f"process {os.getpid()}"
    require_idle(run)


def test_the_lock_ends_with_a_process_that_is_killed(run: RunFolder) -> None:
    with another(run) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (run.path / LOCK_FILE).is_file(), "what it left stops nobody"
    assert writer_of(run) is None
    with only_writer(run):
        pass
    assert not (run.path / LOCK_FILE).exists()


def test_a_writer_of_another_host_is_named_with_it(run: RunFolder) -> None:
    with only_writer(run):
        (run.path / LOCK_FILE).write_text("17 elsewhere\n")
        assert writer_of(run) == "process 17 of elsewhere"
        (run.path / LOCK_FILE).write_text("")
        assert writer_of(run) == "another process"


def test_a_look_in_passing_keeps_no_writer_out(run: RunFolder) -> None:
    """Who lists runs holds a lock for a moment, too."""
    (run.path / LOCK_FILE).touch()
    looking = os.open(run.path / LOCK_FILE, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    Timer(0.03, os.close, [looking]).start()
    with only_writer(run):
        assert writer_of(run) == f"process {os.getpid()}"


def test_a_file_system_without_locks_is_said(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_writer(run), in_turn(run.path):
        assert writer_of(run) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"note: the file system of {run.path} has no locks (No locks available): "
    )
    assert list(run.path.iterdir()) == []


def test_a_folder_that_is_gone_is_one_line(run: RunFolder) -> None:
    run.path.rmdir()
    with pytest.raises(UsageError, match="cannot be written: No such file"), only_writer(run):
        pass


def test_in_turn_nothing_is_lost(tmp_path: Path) -> None:
    """Each process reads a number and writes the next one, as results are added to an index."""
    count = tmp_path / "count"
    count.write_text("0")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mtl_lora_cli.runs.lock import in_turn\n"
        "count = Path(sys.argv[1])\n"
        "for _ in range(200):\n"
        "    with in_turn(count.parent):\n"
        "        count.write_text(str(int(count.read_text()) + 1))\n"
    )
    several = [subprocess.Popen([sys.executable, "-c", code, str(count)]) for _ in range(3)]
    assert [process.wait() for process in several] == [0, 0, 0]
    assert count.read_text() == "600"


def test_another_folder_says_what_it_is_of(run: RunFolder) -> None:
    with (
        only_writer(run, "the comparison is being made"),
        pytest.raises(UsageError, match=f"the comparison is being made by process {os.getpid()};"),
        only_writer(run, "the comparison is being made"),
    ):
        pass
