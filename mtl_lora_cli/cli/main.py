"""Where the command begins, and ends: nothing is loaded before Ctrl-C ends it in order."""

from __future__ import annotations

import atexit
import os
import sys
import threading

from mtl_lora_cli.cli import interrupts
from mtl_lora_cli.machine import collector


def main() -> None:
    """Entry point of the console script."""
    try:
        command()
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            _leave(leaving.code or 0)
        raise


def command() -> None:
    """The command, in a process that is not its own."""
    interrupts.listen()
    collector.loading()
    from mtl_lora_cli.cli.app import app

    try:
        app(prog_name="mtl-lora")  # as a module, too: what a shell completes hangs on the name
    finally:
        sys.stdout.flush()
        os.dup2(2, 1)  # what libraries print at exit is no result


def _leave(code: int) -> None:
    """End as Python does, but for taking millions of objects apart, which the system does at once."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that have to end by themselves
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
