"""The exceptions whose text the user sees.

Everything else that escapes a command is a bug and is shown as one (`--debug` gives the traceback).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """What the process tells the shell."""

    DONE = 0
    FAILED = 1
    USAGE = 2  # the recipe or the call is wrong
    CHECK = 3  # a check did not hold
    INTERRUPTED = 130


class MtlLoraError(Exception):
    """A failure that the user can understand from its text alone, in one line."""

    exit_code = ExitCode.FAILED

    @property
    def lines(self) -> list[str]:
        return [" ".join(str(self).split())]


class NoNumbersError(MtlLoraError):
    """The model finds no number for a row (NaN), and nothing is the likeliest of such."""


class UsageError(MtlLoraError):
    """The recipe, the data or the call is wrong: exit code 2, and nothing has been written."""

    exit_code = ExitCode.USAGE


class LeftOutError(UsageError):
    """One of several tasks cannot be evaluated as asked; the others can.

    Args:
        task: its name.
        why: what it lacks.
    """

    def __init__(self, task: str, why: str) -> None:
        self.task, self.why = task, why
        super().__init__(f"task '{task}': {why}")

    def __reduce__(self) -> tuple[type[LeftOutError], tuple[str, str]]:
        """Pickled as what it is made of: an error may come from another process."""
        return type(self), (self.task, self.why)


class CheckError(MtlLoraError):
    """A check of the result did not hold: exit code 3."""

    exit_code = ExitCode.CHECK


@dataclass(frozen=True)
class Problem:
    """One fault in a file: where it is, what was received and what would be right."""

    file: str
    line: int | None
    key: str
    message: str

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.key}: {self.message}" if self.key else f"{where}: {self.message}"


class ProblemsError(UsageError):
    """All faults found in one reading, shown together, a line each."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[ProblemsError], tuple[list[Problem]]]:
        """Pickled as what it is made of: an error may come from another process."""
        return type(self), (self.problems,)

    @property
    def lines(self) -> list[str]:
        return [" ".join(str(problem).split()) for problem in self.problems]


def did_you_mean(received: str, known: Iterable[str]) -> str:
    """`"; did you mean 'rank'?"` where a known name is near, else the empty string."""
    near = difflib.get_close_matches(received, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def file_problem(
    file: str | Path, message: str, *, line: int | None = None, key: str = ""
) -> ProblemsError:
    """A single fault in a single file, ready to raise."""
    return ProblemsError([Problem(str(file), line, key, message)])


def errno_of(error: BaseException) -> int | None:
    """The system's number of an error (`errno`); None where it is none of the system's.

    safetensors makes of it an error without a number, `I/O error: File too large (os error 27)`, in earlier versions
    `IoError(Os { code: 28, … })`.
    """
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)|\bOs \{ code: (\d+)", str(error))
    return int(found[1] or found[2]) if found else None


def strerror_of(error: BaseException) -> str:
    """What the system says of an error, `File too large`; of any other its own text."""
    number = errno_of(error)
    return str(error) if number is None else os.strerror(number)
