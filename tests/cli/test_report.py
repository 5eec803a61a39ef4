"""`report`, for people and for machines, of one run and of two."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Finished = subprocess.CompletedProcess[str]


@pytest.fixture
def runs(fresh_run: Path) -> Path:
    """A folder with the small run, and a copy of it that never finished."""
    half = fresh_run.with_name("half")
    shutil.copytree(fresh_run, half)
    shutil.rmtree(half / "adapter")
    return fresh_run.parent


def test_the_newest_run_is_reported_in_its_folder(
    invoke: Callable[..., Finished], runs: Path
) -> None:
    for _ in range(2):  # the second one takes the first one's place
        finished = invoke("report")
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout == "runs/small/report.html\n"
    text = (runs / "small" / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "<h1>small</h1>" in text
    assert "Not evaluated yet." in text


def test_several_runs_stand_on_one_page_here(
    invoke: Callable[..., Finished], runs: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    finished = invoke("report", "small", str(runs / "half"), "small", "--plots", "pictures")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "report.html\n"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>small, half</h1>" in text
    pictures = {file.name for file in (tmp_path / "pictures").iterdir()}
    assert {"loss.png", "loss-01-warm.png", "1-gates.png", "2-gates.png"} <= pictures
    assert f"{len(pictures)} plots: pictures" in finished.stderr


def test_json_is_one_document_and_writes_nothing(
    invoke: Callable[..., Finished], runs: Path, tmp_path: Path
) -> None:
    finished = invoke("report", "half", "--json")
    facts = json.loads(finished.stdout)
    assert [run["label"] for run in facts["runs"]] == ["half"]
    assert facts["runs"][0]["summary"]["steps"] == 6
    assert not list(tmp_path.rglob("*.html"))
    finished = invoke("report", "half", "--json", "--output", "half.html")
    assert json.loads(finished.stdout)["runs"] == facts["runs"]
    assert (tmp_path / "half.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("smal",), "no run 'smal' in runs; did you mean 'small'?; runs: half, small"),
        (("small", "/"), "no run '/' in runs; runs: half, small"),
        (("--output", "mine.html"), "mine.html exists and is no report; choose another --output"),
        (("--output", "none/report.html"), "--output: there is no folder TMP/none"),
        (("--output", "runs"), "--output: runs is a folder"),
        (("--plots", "mine.html"), "--plots: mine.html cannot be written to: File exists"),
    ],
)
def test_what_is_wrong_is_one_line(
    invoke: Callable[..., Finished],
    runs: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    error: str,
) -> None:
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    finished = invoke("report", *arguments)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == f"error: {error.replace('TMP', str(tmp_path))}\n"
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
