"""Whatever is wrong with the recipe, the data or the call: one line a fault, code 2, no trace left.

Faults that show before the heavy libraries are loaded are met by a process that has loaded none; for
the others the command runs inside this one, because importing torch again for each would take minutes.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ...forks import Ended, Forks
from .mistakes import FILES, Bad

HEAVY = ("torch", "transformers", "datasets", "accelerate", "sklearn")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder, with size and time of change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def lay_out(folder: Path, case: Bad, fill: Callable[[str], str]) -> None:
    """Write the good files, with the case's in their place.

    A text that is a path below RUNS stands for that file's content.
    """
    for name, text in {**FILES, **case.files}.items():
        if text is None:
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        filled = fill(text)
        if text.startswith("RUNS/"):
            filled = Path(filled).read_text(encoding="utf-8")
        path.write_text(filled, encoding="utf-8")


@pytest.fixture
def refused(
    tmp_path: Path, stories_folder: Path, request: pytest.FixtureRequest
) -> Callable[[Bad], None]:
    """`refused(mistake)`: the command says its lines, ends with 2, and leaves nothing behind."""

    def check(case: Bad) -> None:
        names = {"STORIES": str(stories_folder.resolve()), "TMP": str(tmp_path)}
        if "RUNS" in case.arguments or any("RUNS" in str(text) for text in case.files.values()):
            names["RUNS"] = str(request.getfixturevalue("small_run")[0].parent)

        def fill(text: str) -> str:
            for name, value in names.items():
                text = text.replace(name, value)
            return text

        lay_out(tmp_path, case, fill)
        arguments = [fill(argument) for argument in case.arguments]
        watched = [tmp_path, *([Path(names["RUNS"])] if "RUNS" in names else [])]
        before = [listing(folder) for folder in watched]

        finished: subprocess.CompletedProcess[str] | Ended
        if case.early:
            cold: Forks = request.getfixturevalue("cold")
            finished = cold.run(*arguments, cwd=tmp_path, heavy=HEAVY)
            assert finished.loaded == ()
        else:
            finished = request.getfixturevalue("invoke")(*arguments)

        lines = finished.stderr.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        progress = [line for line in lines if line not in errors]
        expected = [f"error: {fill(error)}" for error in case.errors]
        assert len(errors) == len(expected), finished.stderr
        for received, right in zip(sorted(errors), sorted(expected), strict=True):
            if right.endswith("…"):
                assert received.startswith(right.removesuffix("…"))
            else:
                assert received == right
        assert finished.returncode == 2
        assert finished.stdout == ""
        if case.early:
            assert progress == []
        assert lines[len(progress) :] == errors, "the fault is the last thing said"
        assert "Traceback" not in finished.stderr
        assert [listing(folder) for folder in watched] == before, "something was written"

    return check
