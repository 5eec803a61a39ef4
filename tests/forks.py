"""Commands in forks of one process: each as a process of its own, without starting Python again.

Such a process has a directory, an environment, a stdout and a stderr of its own, and a cold start as
far as the modules go that its parent has not loaded. `Forks()` has loaded the command line alone, so
a fork shows what a command loads and takes; `Forks("torch", …)` saves the seconds in which large
libraries are loaded, where those are not what a test is about.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        returncode: its exit code; minus the number of the signal that killed it.
        stdout, stderr: what it said.
        loaded: those of the modules asked for that it had loaded.
        seconds: of the processor, the start of Python and of the command line included.
    """

    returncode: int
    stdout: str
    stderr: str
    loaded: tuple[str, ...]
    seconds: float


Call = Callable[..., Ended]  # arguments, and the exit code that is expected


class Forks:
    """The process that forks; it ends with this object.

    Args:
        loaded: modules that it loads before the first command.
        environment: of all commands.
    """

    def __init__(self, *loaded: str, environment: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, *loaded],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=None if environment is None else dict(environment),
        )

    def run(
        self, *arguments: str, cwd: Path, heavy: Sequence[str] = (), seconds: float = 300
    ) -> Ended:
        """`mtl-lora` with these arguments, to its end; killed after so many seconds."""
        request = {
            "arguments": arguments,
            "cwd": str(cwd),
            "heavy": tuple(heavy),
            "seconds": seconds,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(request)}\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Ended(**{**answer, "loaded": tuple(answer["loaded"])})

    def close(self) -> None:
        self._process.communicate()


def _child(request: dict[str, Any], stdout: TextIO, stderr: TextIO, loaded: TextIO) -> int:
    """In the fork: the command's exit code."""
    from mtl_lora_cli.cli.main import command

    signal.setitimer(signal.ITIMER_REAL, request["seconds"])  # nobody handles it: it ends at once
    os.setpgid(0, 0)
    os.chdir(request["cwd"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    sys.argv = ["mtl-lora", *request["arguments"]]
    code: int | str | None = 0
    try:
        command()
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    json.dump([name for name in request["heavy"] if name in sys.modules], loaded)
    loaded.flush()
    return code if isinstance(code, int) else int(code is not None)


def _answer(request: dict[str, Any], start: float) -> dict[str, Any]:
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as stdout,
        tempfile.TemporaryFile("w+", encoding="utf-8") as stderr,
        tempfile.TemporaryFile("w+", encoding="utf-8") as loaded,
    ):
        child = os.fork()
        if child == 0:
            os._exit(_child(request, stdout, stderr, loaded))
        _, status, used = os.wait4(child, 0)
        for file in (stdout, stderr, loaded):
            file.seek(0)
        return {
            "returncode": os.waitstatus_to_exitcode(status),
            "stdout": stdout.read(),
            "stderr": stderr.read(),
            "loaded": json.loads(loaded.read() or "[]"),
            "seconds": start + used.ru_utime + used.ru_stime,
        }


def serve() -> None:
    """Answer requests on stdin, a line of JSON each."""
    import mtl_lora_cli.cli.app  # noqa: F401 - what every command begins with

    used = resource.getrusage(resource.RUSAGE_SELF)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line), used.ru_utime + used.ru_stime)), flush=True)


if __name__ == "__main__":
    serve()
