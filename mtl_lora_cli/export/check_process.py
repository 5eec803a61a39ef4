"""The process that a check runs in. It is spoken to in lines, and JSON on stdout is its answer.

    python -m mtl_lora_cli.export.check_process
    {"run": …, "task": …, "folder": …, …}
    written

The first line is the request; the second one says that the folder is there. Everything else that is printed goes
to stderr. When stdin closes, whoever asked is gone.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from mtl_lora_cli.machine import collector
from mtl_lora_cli.machine.leaving import leave


def main() -> None:
    """Answer one request."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asked hears it, too, and closes stdin
    stdout = os.dup(1)
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    collector.loading()
    _load()
    request = json.loads(lines.get())
    with open(stdout, "w", encoding="utf-8") as file:  # noqa: PTH123 - it is a descriptor
        json.dump(answer(request, lines.get), file)
    leave(0)


def _load() -> None:
    """What any check needs, while nobody asks yet."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401 - loaded when asked for

    import mtl_lora_cli.export.check  # noqa: F401


def answer(request: dict[str, Any], written: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """A comparison, or what went wrong: an error for the user, or a fault with its traceback.

    Args:
        request: `WrittenCheck.request`.
        written: waits until the folder is there.
    """
    from mtl_lora_cli.errors import MtlLoraError

    try:
        from mtl_lora_cli.evaluation.opened import open_run
        from mtl_lora_cli.export.check import WrittenCheck, questions_about
        from mtl_lora_cli.extensions import load_named_extensions
        from mtl_lora_cli.runs.folder import RunFolder
        from mtl_lora_cli.tasks.chosen import select_tasks

        load_named_extensions()
        run = open_run(RunFolder(Path(request["run"])))
        (task,) = select_tasks(run.tasks, request["task"])
        folder = Path(request["folder"])
        early = request["early"]
        if not early:
            written()
        questions = questions_about(folder, run, task, request["limit"], early=early)
        wait = written if early else lambda: None
        comparison = WrittenCheck.of(request).compare(questions, folder, wait)
    except MtlLoraError as error:
        return {"error": str(error), "code": error.exit_code}
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return {"error": text, "code": None, "traceback": traceback.format_exc()}
    return {"comparison": dataclasses.asdict(comparison)}


def _listen(lines: SimpleQueue[str]) -> None:
    """Pass lines on; when there are no more, whoever asked is gone."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(1)


if __name__ == "__main__":
    main()
