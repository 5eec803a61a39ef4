"""On Ray: the same files as without it, whoever is killed meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.prediction.course import Course
from mtl_lora_cli.prediction.desks import How
from mtl_lora_cli.prediction.frames import FramePredictor
from mtl_lora_cli.prediction.order import Order, Work, opened_work
from mtl_lora_cli.runs.folder import RunFolder

from .conftest import rows_of
from .test_parts import contents

pytest.importorskip("ray")
pytestmark = [pytest.mark.long, pytest.mark.slow]


@pytest.fixture
def order(tmp_path: Path, write_lines: Any) -> Order:
    for name in ("one.jsonl", "two.jsonl"):
        write_lines(name, rows_of(400))
    return Order(tmp_path / "rows", tmp_path / "out", How(task_column="of"), {}, part_rows=50)


def expected(run: RunFolder, order: Order) -> dict[str, bytes]:
    """Without Ray."""
    opened, other = Run(run), replace(order, output=order.output.parent / "whole")
    with opened_work(opened, other) as work:
        course = Course(opened, work.job)
        work.follow(course.run(work.missing))
        course.close()
    return contents(other.output)


def actors() -> list[int]:
    """Processes that have a model."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ray::MapWorker" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return [number for number in found if is_ours(number)]


def is_ours(number: int) -> bool:
    while number > 1:
        try:
            number = int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
        if number == os.getpid():
            return True
    return False


def answered(work: Work, **given: Any) -> Iterator[Any]:
    from mtl_lora_cli.prediction.ray_actors import answers_of

    return answers_of(work.job, work.missing, address="local", **given)


def test_two_actors_one_of_which_is_killed(run_folder: RunFolder, order: Order) -> None:
    right = expected(run_folder, order)
    killed: list[int] = []

    def kill(work: Work) -> None:
        while work.totals.done_parts < 3:
            time.sleep(0.02)
        for number in actors()[:1]:
            os.kill(number, signal.SIGKILL)
            killed.append(number)

    with opened_work(Run(run_folder), order) as work:
        killer = threading.Thread(target=kill, args=(work,))
        killer.start()
        work.follow(answered(work, actors=2))
        killer.join()
        work.finish()
        assert work.missing == []
        assert work.totals.done_rows == 800
    assert len(killed) == 1
    found = contents(order.output)
    assert {name: text for name, text in found.items() if ".partial" not in name} == right
    assert len((order.output / "_parts.jsonl").read_text().splitlines()) == len(right)


def test_the_command_says_no_more_than_without_it(
    order: Order, run_folder: RunFolder, tmp_path: Path
) -> None:
    own = [sys.executable, "-m", "mtl_lora_cli.cli.main", "predict", "--run", str(run_folder.path)]
    more = ["--input", "rows", "--output", "out", "--task-column", "of", "--ray", "local"]
    ended = subprocess.run(
        [*own, *more, "--actors", "1"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    said = [line for line in ended.stderr.splitlines() if " of 800 rows (" not in line]
    assert (ended.returncode, said) == (0, [])
    assert json.loads(ended.stdout)["rows"] == 800
    table = FramePredictor(run_folder.path, task_column="of")
    (line,) = (tmp_path / "out" / "one-00000.jsonl").read_text().splitlines()[:1]
    row = json.loads(line)
    found = table(pandas.DataFrame([{k: v for k, v in row.items() if k != "prediction"}]))
    assert json.loads(found["prediction"][0])["label"] == row["prediction"]["label"]


def test_a_bad_row_is_one_line(run_folder: RunFolder, order: Order, write_lines: Any) -> None:
    write_lines("two.jsonl", [*rows_of(3), {"of": "warm"}])
    with (
        opened_work(Run(run_folder), order) as work,
        pytest.raises(UsageError, match=r"two\.jsonl:4: task 'warm': prompt: the row has no"),
    ):
        work.follow(answered(work, actors=1))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "--ray 127.0.0.1:1: no cluster can be reached: Connection refused"),
        ("ray://head:10001", "--ray ray://head:10001: expected local, auto, or HOST:PORT"),
    ],
)
def test_no_cluster_is_one_line(
    address: str, message: str, run_folder: RunFolder, order: Order
) -> None:
    from mtl_lora_cli.prediction.ray_actors import answers_of

    with (
        opened_work(Run(run_folder), order) as work,
        pytest.raises(UsageError, match=re.escape(message)),
    ):
        work.follow(answers_of(work.job, work.missing, address=address, actors=1))
    assert not order.output.joinpath("_parts.jsonl").exists()
