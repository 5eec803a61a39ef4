"""Where the command begins: nothing is loaded before Ctrl-C ends it in order."""

from __future__ import annotations

import os
import sys

from mtl_lora_cli.cli import interrupts


def main() -> None:
    """Entry point of the console script."""
    interrupts.listen()
    from mtl_lora_cli.cli.app import app

    try:
        app(prog_name="mtl-lora")  # as a module, too: what a shell completes hangs on the name
    finally:
        sys.stdout.flush()
        os.dup2(2, 1)  # what libraries print at exit is no result


if __name__ == "__main__":
    main()
