"""Python files of the user's own that add to what is built in: a method, a metric, a format of export.

A recipe names them under `extensions`, the command line before the command (`mtl-lora --extension FILE
export …`), and the environment in MTL_LORA_EXTENSIONS. A file is run once a process. What it declares
with our decorators stands beside the built-in things of its kind, in this process and in those that it
starts.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

from mtl_lora_cli.errors import MtlLoraError, UsageError, file_problem

VARIABLE = "MTL_LORA_EXTENSIONS"
_run: set[Path] = set()


def load_extensions(paths: Iterable[str | Path]) -> None:
    """Run files, in order, those that this process has not run yet.

    Raises:
        ProblemsError: a file is missing, or fails; the line of it is named.
    """
    for path in paths:
        _load(Path(path).resolve())


def load_named_extensions() -> None:
    """Run the files that the environment names: the user's, or those of the process that started this one."""
    load_extensions(_named())


def origin(declared: Callable[..., Any]) -> str:
    """Where a function or a class was declared, `costs.py:12`, for messages about it."""
    code = getattr(declared, "__code__", None)
    if code is not None:
        return f"{code.co_filename}:{code.co_firstlineno}"
    return str(getattr(sys.modules.get(declared.__module__), "__file__", declared.__module__))


def fault_of(declared: Callable[..., Any], error: BaseException) -> UsageError:
    """An error of something that an extension declares, as the line of the extension where it was met."""
    module = sys.modules.get(declared.__module__)
    path = Path(str(getattr(module, "__file__", None) or origin(declared)))
    return file_problem(path, _said(error), line=_line_in(path, error))


def is_ours(declared: Callable[..., Any]) -> bool:
    """Whether it is built in."""
    return str(declared.__module__).startswith("mtl_lora_cli.")


class _AsWritten(SourceFileLoader):
    """Compiles the file each time, and leaves nothing beside it: a compiled copy counts as new for as long
    as size and second of the last change are the same."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _load(path: Path) -> None:
    if path in _run:
        return
    if not path.is_file():
        raise file_problem(path, "no such extension file")
    name = f"mtl_lora_extension_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if path.suffix != ".py":
        raise file_problem(path, "an extension is a Python file, and ends in .py")
    spec = importlib.util.spec_from_file_location(name, path, loader=_AsWritten(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file may fail in any way
        del sys.modules[name]
        if isinstance(error, MtlLoraError) and str(error).startswith(f"{path}:"):
            raise  # it says where already
        raise file_problem(path, _said(error), line=_line_in(path, error)) from error
    _run.add(path)
    os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys([*_named(), str(path)]))


def _named() -> list[str]:
    return [one for one in os.environ.get(VARIABLE, "").split(os.pathsep) if one]


def _said(error: BaseException) -> str:
    if isinstance(error, MtlLoraError):
        return str(error)
    what = error.msg if isinstance(error, SyntaxError) else error
    return f"{type(error).__name__}: {what}"


def _line_in(path: Path, error: BaseException) -> int | None:
    """The line of the file at which it failed: the innermost one that is its own."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((one.lineno for one in reversed(frames) if one.filename == str(path)), None)


def require_new(kind: str, name: str, known: Callable[..., Any] | None) -> None:
    """Refuse to declare a name twice.

    Args:
        kind: of the thing, for the message: `metric`.
        name: of the new one.
        known: what is declared under that name already; None: nothing.

    Raises:
        UsageError: something is.
    """
    if known is not None:
        raise UsageError(
            f"a {kind} '{name}' is there already ({origin(known)}); choose another name"
        )
