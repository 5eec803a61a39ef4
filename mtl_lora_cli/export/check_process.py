"""The process that a check runs in: the request is its argument, JSON on stdout is its answer.

    python -m mtl_lora_cli.export.check_process '{"run": …, "task": …, "folder": …, …}'

Everything else that is printed goes to stderr. When stdin closes, whoever asked is gone.
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
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer one request."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asked hears it, too, and closes stdin
    stdout = os.dup(1)
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    threading.Thread(target=_end_with_the_asker, daemon=True).start()
    with open(stdout, "w", encoding="utf-8") as file:  # noqa: PTH123 - it is a descriptor
        json.dump(answer(json.loads(sys.argv[1])), file)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """A comparison, or what went wrong: an error for the user, or a fault with its traceback."""
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
        questions = questions_about(folder, run, task, request["limit"])
        comparison = WrittenCheck.of(request).compare(questions, folder)
    except MtlLoraError as error:
        return {"error": str(error), "code": error.exit_code}
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return {"error": text, "code": None, "traceback": traceback.format_exc()}
    return {"comparison": dataclasses.asdict(comparison)}


def _end_with_the_asker() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
