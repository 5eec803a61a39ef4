"""What a process that compiles kernels does around its work: it reads a request, and ends with whoever asked.

It says nothing: what it could not do is done, and told, by the one who asked.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mtl_lora_cli.machine import collector
from mtl_lora_cli.machine.launch import end_with_parent


def answer(work: Callable[[Any], None]) -> None:
    """Do the work that stdin asks for, and end.

    Args:
        work: takes the request.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asked hears it, too, and closes stdin
    end_with_parent()
    warnings.filterwarnings("ignore")
    collector.loading()
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_listen, daemon=True).start()
    with suppress(Exception):
        work(request)
    os._exit(0)


def _listen() -> None:
    """When nobody speaks any more, whoever asked is gone."""
    sys.stdin.read()
    os._exit(1)
