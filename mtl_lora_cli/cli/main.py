"""Where the command begins, and ends: nothing is loaded before Ctrl-C ends it in order."""

from __future__ import annotations

import os
import sys

from mtl_lora_cli.cli import interrupts
from mtl_lora_cli.machine import collector
from mtl_lora_cli.machine.leaving import leave


def main() -> None:
    """Entry point of the console script."""
    try:
        command()
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            leave(leaving.code or 0)
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


if __name__ == "__main__":
    main()
