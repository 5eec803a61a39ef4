"""`predict --input FOLDER --output FOLDER` as a user calls it, and what a killed process leaves."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet

from mtl_lora_cli.cli.predict import _asked
from mtl_lora_cli.cli.predict_parts import Progress
from mtl_lora_cli.prediction.order import Totals
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.tasks.chosen import read_tasks

from ..forks import Ended, Forks
from .conftest import Finished, rows_of, written_run
from .test_parts import contents

Call = Callable[..., Ended]
Invoke = Callable[..., Finished]
SEED = 5
OUT = ("--input", "rows", "--output", "out")


@pytest.fixture
def apart(forks: Forks, run_folder: RunFolder, tmp_path: Path) -> Call:
    """`apart(*arguments)` is `predict` in a process of its own, killed after so many seconds."""

    def run(*arguments: str, seconds: float = 120) -> Ended:
        own = ("predict", "--run", str(run_folder.path), *arguments)
        return forks.run(*own, cwd=tmp_path, seconds=seconds)

    return run


def test_a_folder_twice(call: Invoke, write_lines: Any, tmp_path: Path) -> None:
    write_lines("one.jsonl", rows_of(23))
    arguments = ("--input", "rows", "--output", "out", "--task-column", "of", "--part-rows", "10")
    first = call(*arguments)
    assert (first.returncode, first.stderr) == (0, "")
    said = json.loads(first.stdout)
    assert (said["rows"], said["parts"], said["answered_now"], said["bad_rows"]) == (23, 3, 3, 0)
    found = contents(tmp_path / "out")
    again = call(*arguments)
    assert again.returncode == 0
    assert again.stderr == "going on: 3 of 3 parts are answered, 23 of 23 rows\n"
    assert json.loads(again.stdout)["answered_now"] == 0
    assert contents(tmp_path / "out") == found
    lines = call("--task-column", "of", "rows/one.jsonl").stdout.splitlines()
    for line, row in zip(lines, b"".join(found.values()).splitlines(), strict=True):
        one, other = json.loads(line), json.loads(row)["prediction"]
        assert one.pop("probabilities") == pytest.approx(other.pop("probabilities"), abs=1e-5)
        assert one == other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected FILE, - for stdin, or --input FOLDER with --output FOLDER"),
        (("--input", "rows"), "--input goes with --output FOLDER"),
        (("--input", "no", "--output", "out"), "no: no such file or folder"),
        (("--input", "rows", "--output", "rows/out"), "one of it and --input lies in the other"),
        (("--input", "rows", "--output", "out", "rows/one.jsonl"), "give rows/one.jsonl or --inp"),
        (("rows/one.jsonl", "--part-rows", "5"), "--part-rows goes with --input FOLDER"),
        (("rows/one.jsonl", "--output", "out"), "--output is for maps and --input"),
        (("--input", "rows", "--output", "out", "--actors", "2"), "--actors goes with --ray"),
        ((*OUT, "--format", "glue"), "--format glue goes with FI"),
        ((*OUT, "--format", "jsonl"), "--input is answered in its own form: Parquet as Parquet"),
        (("--input", "rows", "--output", "out", "--task", "warn"), "did you mean 'warm'?"),
        ((*OUT, "--errors", "rows/bad.jsonl"), "--errors rows/bad.jsonl: lies in --input rows"),
        ((*OUT, "--errors", "out/bad.jsonl"), "--errors out/bad.jsonl: lies in --output out"),
        ((*OUT, "--errors", "mine.jsonl"), "--errors mine.jsonl: exists and holds no such errors"),
        (
            ("--input", "rows/one.jsonl", "--output", "out", "--errors", "rows/one.jsonl"),
            "--errors rows/one.jsonl: lies in --input rows/one.jsonl",
        ),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(
    arguments: tuple[str, ...], message: str, call: Invoke, write_lines: Any, tmp_path: Path
) -> None:
    write_lines("one.jsonl", rows_of(3))
    (tmp_path / "mine.jsonl").write_text('{"file": "what I wrote down"}\n')
    which = () if "--task" in arguments else ("--task-column", "of")
    ended = call(*arguments, *which)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_bad_row_ends_it_and_says_how_to_go_on(
    call: Invoke, write_lines: Any, tmp_path: Path
) -> None:
    rows = rows_of(40)
    write_lines("one.jsonl", [*rows[:39], {"word": "x", "of": "wram"}])
    arguments = ("--input", "rows", "--output", "out", "--task-column", "of", "--part-rows", "10")
    ended = call(*arguments, "--lanes", "1")
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [
        "3 of 4 parts are answered, 30 of 40 rows; the same command goes on from there",
        "error: rows/one.jsonl:40: of: unknown task 'wram'; did you mean 'warm'?; "
        "tasks of this run: warm, cold, free",
    ]
    (tmp_path / "bad.jsonl").write_text('{"file": "a", "row": 1, "error": "of before"}\n')
    listed = call(*arguments, "--errors", "bad.jsonl")
    assert listed.returncode == 0
    assert listed.stderr.splitlines() == [
        "going on: 3 of 4 parts are answered, 30 of 40 rows",
        "note: 1 of 40 rows could not be answered: bad.jsonl",
    ]
    assert json.loads((tmp_path / "bad.jsonl").read_text())["row"] == 40
    assert call(*arguments).stderr.splitlines() == [
        "going on: 4 of 4 parts are answered, 40 of 40 rows",
        "note: 1 of 40 rows could not be answered: --errors FILE lists them",
    ]


def answers_in(output: Path) -> list[dict[str, Any]]:
    text = b"".join(content for _, content in sorted(contents(output).items()))
    return [json.loads(line) for line in text.splitlines()]


def test_rows_for_which_the_model_finds_no_number_are_listed(
    small_model: Path, call: Invoke, write_lines: Any, tmp_path: Path
) -> None:
    """Sums of one task leave float32; those of the others are what they were."""
    write_lines("one.jsonl", rows_of(40))
    usual = ("--input", "rows", "--output", "out", "--task-column", "of", "--part-rows", "10")
    assert call(*usual).returncode == 0
    right = answers_in(tmp_path / "out")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("task_transform"):
                tensor[1] *= 1e38

    run = written_run(tmp_path / "run", small_model, change)
    again = (*usual[:3], "new", *usual[4:], "--run", str(run.path))
    ended = call(*again)
    assert ended.returncode == 1
    assert "the model finds no finite log-probability for an answer to this row" in ended.stderr
    listed = call(*again, "--errors", "bad.jsonl")
    assert listed.returncode == 0, listed.stderr
    cold = [row["id"] for row in rows_of(40) if row["of"] == "cold"]
    bad = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [row["row"] - 1 for row in bad] == cold
    expected = [one for one in right if one["id"] not in cold]
    for one, wanted in zip(answers_in(tmp_path / "new"), expected, strict=True):
        likely = wanted["prediction"].pop("probabilities")
        assert one["prediction"].pop("probabilities") == pytest.approx(likely, abs=1e-6)
        assert one == wanted


def test_fields_of_other_names_whoever_answers(run_folder: RunFolder) -> None:
    named = {task.name: task for task in read_tasks(run_folder)}
    assert [one.name for one in _asked(named, ["cold", "warm"])] == ["cold", "warm"]
    assert [one.name for one in _asked(named, "cold")] == ["cold"]
    for everyone in (None, "all", "auto"):
        assert [one.name for one in _asked(named, everyone)] == list(named)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_killed_at_ten_random_moments(
    form: str, apart: Call, write_lines: Any, tmp_path: Path
) -> None:
    for name in ("one.jsonl", "two.jsonl"):
        path, rows = write_lines(name, rows_of(3000)), rows_of(3000)
        if form == "parquet":
            path.unlink()
            parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))
    arguments = ("--input", "rows", "--task-column", "of", "--part-rows", "50", "--output")
    clock = time.monotonic()
    began = apart(*arguments, "whole")
    clock = time.monotonic() - clock
    assert began.returncode == 0, began.stderr
    whole, took = contents(tmp_path / "whole"), json.loads(began.stdout)["seconds"]
    chance, seen, start, before = random.Random(SEED), [], clock - took, 0
    partly: set[int] = set()
    while len(seen) < 10 or (len(partly) < 3 and len(seen) < 25):
        ended = apart(*arguments, "out", seconds=start + chance.uniform(0, took / 5))
        assert ended.returncode in (0, -signal.SIGALRM), ended.stderr
        found = contents(tmp_path / "out") if (tmp_path / "out").exists() else {}
        assert found.items() <= whole.items()  # whole files, never others
        assert len(found) >= before
        start += 0.2 * clock * (len(found) == before)  # on a machine that others use, too
        before = len(found)
        seen.append(before)
        if before == len(whole):  # nobody was killed: from the start again
            shutil.rmtree(tmp_path / "out")
            before, start = 0, clock - took
        elif before:
            partly.add(before)
    ended = apart(*arguments, "out")
    assert ended.returncode == 0, ended.stderr
    assert contents(tmp_path / "out") == whole
    print("parts that were done at each kill:", seen, "of", len(whole))
    assert len(partly) > 2
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.mark.long
@pytest.mark.slow
def test_interrupted_it_says_how_to_go_on(
    run_folder: RunFolder, write_lines: Any, tmp_path: Path
) -> None:
    write_lines("one.jsonl", rows_of(6000))
    arguments = ["--input", "rows", "--output", "out", "--task-column", "of", "--part-rows", "50"]
    own = [sys.executable, "-m", "mtl_lora_cli.cli.main", "predict", "--run", str(run_folder.path)]
    process = subprocess.Popen(
        [*own, *arguments],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    journal = tmp_path / "out" / "_parts.jsonl"
    while not journal.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    line = said.splitlines()[-1]
    done = len(journal.read_text().splitlines())
    assert line == (
        f"error: interrupted: {done} of 120 parts are answered, {50 * done:,} of 6,000 rows; "
        "the same command goes on from there"
    )
    assert len(contents(tmp_path / "out")) in (done, done + 1)
    assert not list((tmp_path / "out").rglob(".*"))


def test_progress_says_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    progress = Progress(Totals(1000, 10, 200, 2, 0, 0), clock=lambda: now[0])
    now[0] = 100  # a model was loaded
    progress.rows(100)
    now[0] = 120
    progress.rows(200)
    progress.part(0)
    assert capsys.readouterr().err.splitlines() == [
        "300 of 1,000 rows (30%), 2 of 10 parts",
        "500 of 1,000 rows (50%), 2 of 10 parts, 10 rows/s, 50 s left",
    ]
    assert progress.line(120).startswith("500 of 1,000 rows (50%), 3 of 10 parts")
