"""Starting the processes of a run on this host, and ending them together."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from mtl_lora_cli.visible import tell

_GRACE = 20.0  # seconds that the others have to say what they know, when one has ended
_LOOK = 0.1
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def equivalent(arguments: Sequence[str], processes: int) -> str:
    """The torchrun command that starts the same processes.

    Without `--` torchrun takes our `--run` for the beginning of an option of its own.
    """
    own = shlex.join(["mtl-lora", *arguments])
    return f"torchrun --standalone --nproc-per-node {processes} --no-python -- {own}"


def launch(arguments: Sequence[str], processes: int, stdout: int | None = None) -> int:
    """Run `mtl-lora ARGUMENTS` so many times, as one run.

    Ctrl-C and SIGTERM reach each process once. When one fails, the others are ended, too.

    Args:
        arguments: of the command.
        processes: how many.
        stdout: the file that they write results to; by default this process's own.

    Returns:
        The exit code of the process that failed first, 128 + N where signal N ended it; else 0.
    """
    port = _free_port()
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    started = []
    for rank in range(processes):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        }
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "mtl_lora_cli.cli.main", *arguments],
                env=environment,
                stdout=stdout,
                # A terminal sends Ctrl-C to a whole session: here it comes through this process,
                # once, as a SIGTERM does.
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        )

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _watch(started)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in started:
            if process.poll() is None:
                process.kill()


def _watch(started: Sequence[subprocess.Popen[bytes]]) -> int:
    first: int | None = None
    deadline = float("inf")
    while any(process.poll() is None for process in started):
        if first is None and any(process.poll() for process in started):
            first = _told(started)
            deadline = time.monotonic() + _GRACE
        if time.monotonic() > deadline:
            for process in started:
                if process.poll() is None:
                    process.kill()
        time.sleep(_LOOK)
    if first is None:
        first = _told(started)
    return first


def _told(started: Sequence[subprocess.Popen[bytes]]) -> int:
    """The first failure's exit code; who was ended by a signal cannot speak for itself."""
    for rank, process in enumerate(started):
        code = process.poll()
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            tell(
                f"error: process {rank + 1} of {len(started)} (process id {process.pid}) was ended "
                f"by {name}; the others are ended, too"
            )
            return 128 - code
    return next((process.poll() or 0 for process in started if process.poll()), 0)


def end_with_parent() -> None:
    """Asked of Linux: no process is left behind when this one is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
