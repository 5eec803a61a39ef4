"""Asks every command for its help, each in a fork of this process, and tells what it took.

Run as a program with the seconds it may take, the modules it should not load, joined by commas, and
the commands, their words joined by spaces: it prints a line of JSON for each of them. A fork has
loaded nothing but the command line, so each help is as cold as in a process of its own, and what
Python and the command line took to start is counted with each.
"""

from __future__ import annotations

import json
import os
import resource
import sys

import mtl_lora_cli.cli.main as cli


def ask(words: list[str], heavy: list[str]) -> tuple[list[str], float]:
    """Heavy modules that the help loads, and seconds of the processor that it takes."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code: int | str | None = "it did not leave"
        try:
            cli.app([*words, "--help"], prog_name="mtl-lora")
        except SystemExit as leaving:
            code = leaving.code
        sys.stdout.flush()
        os.write(writing, " ".join(name for name in heavy if name in sys.modules).encode())
        os._exit(code if isinstance(code, int) else 70)
    os.close(writing)
    with os.fdopen(reading) as said:
        loaded = said.read().split()
    _, status, used = os.wait4(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"{words}: exit status {status}"
    return loaded, used.ru_utime + used.ru_stime


def main() -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    start, limit, heavy = used.ru_utime + used.ru_stime, float(sys.argv[1]), sys.argv[2].split(",")
    for command in sys.argv[3:]:
        for _ in range(5):  # what other processes do shows in a single measurement
            loaded, seconds = ask(command.split(), heavy)
            if start + seconds <= limit:
                break
        print(json.dumps({"command": command, "loaded": loaded, "seconds": start + seconds}))


if __name__ == "__main__":
    main()
