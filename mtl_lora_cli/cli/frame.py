"""What every command stands in: one clean line for a failure, a clean stdout for results.

Inside the frame everything that prints to stdout, libraries included, is sent to stderr; only
`emit` writes to the real stdout. So `--json` can be piped whatever a library says while importing.
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from mtl_lora_cli.cli import interrupts
from mtl_lora_cli.errors import ExitCode, MtlLoraError, errno_of, strerror_of
from mtl_lora_cli.visible import tell, visible, visible_json

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LONG = 2**20  # characters of JSON: with line ends it takes ten times as long to write
_debug = False
_stdout: int | None = None  # the real stdout while a frame is open


def set_debug(on: bool) -> None:
    """Show tracebacks instead of single lines."""
    global _debug
    _debug = on


@contextmanager
def framed() -> Iterator[None]:
    """Run a command's body.

    Raises:
        typer.Exit: with the exit code of whatever went wrong.
    """
    global _stdout
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not _debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        # It recommends a kernel that none of our products would call, at every import.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        # Who has lost another process says so in a line; torch would say it with its C++ frames.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")
        warnings.filterwarnings("ignore")
    sys.stdout.flush()
    _stdout = os.dup(1)
    os.dup2(2, 1)
    interrupts.framed = True
    try:
        yield
    except typer.Exit:
        raise
    except MtlLoraError as error:
        if interrupts.asked:
            _fail(["interrupted"], ExitCode.INTERRUPTED)
        _fail(error.lines, error.exit_code)
    except (KeyboardInterrupt, typer.Abort) as error:  # Ctrl-C, or Ctrl-D at a question
        _fail([str(error) or "interrupted"], ExitCode.INTERRUPTED)
    except BrokenPipeError:
        os._exit(ExitCode.FAILED)  # the reader of our output went away; nobody is left to tell
    except Exception as error:
        _fail_unforeseen(error)
    finally:
        sys.stdout.flush()
        ctypes.CDLL(None).fflush(None)  # what C libraries (NCCL, for one) still hold back
        os.dup2(_stdout, 1)
        os.close(_stdout)
        _stdout = None
        interrupts.framed = False


def _fail_unforeseen(error: Exception) -> None:
    if interrupts.asked:  # a library has made another error of it
        _fail(["interrupted"], ExitCode.INTERRUPTED)
    if isinstance(error, OSError) and error.filename is not None:  # a disk or a folder, by its name
        text = f"{error.filename}: {error.strerror}"
    elif errno_of(error) in _FULL:  # a write knows no name
        text = f"{strerror_of(error)}: a disk that was written to"
    else:
        text = "internal error: " + " ".join(f"{type(error).__name__}: {error}".split())
    _fail([f"{text} (--debug shows where)"], ExitCode.FAILED)


def _fail(lines: list[str], code: ExitCode) -> None:
    if _debug:
        traceback.print_exc()
    for line in lines:
        tell(f"error: {line}")
    raise typer.Exit(int(code))


def emit(text: str, *, styled: bool = False) -> None:
    """Write a result to the real stdout.

    Args:
        text: the result.
        styled: it has colours of our own; then whoever made it has shown strangers' control characters.
    """
    shown = (text if styled else visible(text)) + "\n"
    data = shown.encode(errors="backslashreplace")  # a file's name may be no text
    if _stdout is None:
        sys.stdout.write(data.decode())
        return
    sys.stderr.flush()
    while data:
        data = data[os.write(_stdout, data) :]


def emit_json(content: Any) -> None:
    """Write a result as one JSON document; one that nobody would read stands on one line."""
    text = as_json(content)
    emit(text if len(text) > _LONG else as_json(content, indent=1))


def as_json(content: Any, indent: int | None = None) -> str:
    """A JSON document, on one line or on several."""
    return visible_json(json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False))


say = tell


def status(text: str) -> None:
    """What is going on, for a person who waits: said on a terminal only.

    Elsewhere a call that fails leaves exactly the lines of its faults on stderr.
    """
    if sys.stderr.isatty():
        say(text)


def real_stdout() -> int:
    """Where results go, for a process that is started to write them."""
    return 1 if _stdout is None else _stdout


def stdout_is_terminal() -> bool:
    """Whether a person reads the results as they come, in colours unless NO_COLOR is set."""
    return os.isatty(real_stdout()) and not os.environ.get("NO_COLOR")
