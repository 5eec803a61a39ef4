"""A process that does jobs of a comparison: see `workers.py`, which starts it.

    python -m mtl_lora_cli.compare.worker_process DESCRIPTOR

DESCRIPTOR is that of a connection: first the plan comes through it, then a job at a time, and an
outcome goes back. When it closes, whoever asked is done, or gone. What is printed goes to a log.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import warnings
from multiprocessing.connection import Connection

from mtl_lora_cli.machine import collector
from mtl_lora_cli.machine.leaving import leave


def main() -> None:
    """Do jobs until there are no more."""
    connection = Connection(int(sys.argv[1]))
    planned = connection.recv_bytes()  # before libraries are loaded: whoever sends it waits
    warnings.filterwarnings("ignore")
    collector.loading()
    # Ctrl-C is passed on by whoever asked, who says it, too.
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        from mtl_lora_cli.compare.work import Work
        from mtl_lora_cli.extensions import load_named_extensions

        load_named_extensions()
        study, sys.argv = pickle.loads(planned)  # the command line as runs remember it
        work = Work(study)
        while True:
            connection.send(work.attempt(connection.recv()))
    leave(0)


if __name__ == "__main__":
    main()
