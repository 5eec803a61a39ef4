"""`predict` as a user calls it: from files and pipes, for one task and for several."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mtl_lora_cli
from mtl_lora_cli.evaluation.predict import Predictor

Finished = Any


@pytest.fixture
def run(fresh_run: Path, tmp_path: Path) -> Path:
    """The finished run, and rows beside `runs`."""
    rows = [{"word": word, "of": of} for word, of in (("pink", "warm"), ("dog", "cold"))]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "rows.csv").write_text("word,of\npink,warm\ndog,cold\n", encoding="utf-8")
    return fresh_run


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.csv"])
def test_one_task_and_a_column_of_tasks(
    run: Path, invoke: Callable[..., Finished], file: str
) -> None:
    several = invoke("predict", "--task-column", "of", file)
    assert several.returncode == 0, several.stderr
    first, second = map(json.loads, several.stdout.splitlines())
    assert (first["task"], second["task"]) == ("warm", "cold")
    assert set(first["probabilities"]) == {"yes", "no"}
    assert first["label"] == first["answer"] in {"yes", "no"}
    one = invoke("predict", "--task", "warm", file)
    same, other = map(json.loads, one.stdout.splitlines())
    assert same["probabilities"] == pytest.approx(first["probabilities"])
    assert other["task"] == "warm"
    assert other["probabilities"] != pytest.approx(second["probabilities"], abs=1e-6)


@pytest.mark.parametrize("tasks", ["all", "cold,warm"])
def test_each_row_is_answered_by_all_tasks(
    run: Path, invoke: Callable[..., Finished], tasks: str
) -> None:
    found = invoke("predict", "--task", tasks, "rows.jsonl")
    assert found.returncode == 0, found.stderr
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [list(line) for line in lines] == [
        ["warm", "cold"] if tasks == "all" else ["cold", "warm"]
    ] * 2
    for name in ("warm", "cold"):
        alone = invoke("predict", "--task", name, "rows.jsonl").stdout.splitlines()
        for line, one in zip(lines, map(json.loads, alone), strict=True):
            assert line[name]["probabilities"] == pytest.approx(one.pop("probabilities"))
            assert line[name].items() >= one.items()


def test_the_python_side_says_the_same(run: Path, invoke: Callable[..., Finished]) -> None:
    printed = invoke("predict", "--task", "warm", "rows.jsonl").stdout.splitlines()
    predictor = mtl_lora_cli.load(run)
    assert isinstance(predictor, Predictor)
    assert predictor.tasks == ("warm", "cold")
    found = predictor.predict([{"word": "pink"}, {"word": "dog"}], task="warm")
    assert found == [json.loads(line) for line in printed]


@pytest.mark.slow
def test_a_pipe_is_answered_row_by_row(
    run: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    """The second row is written when the first one has its answer."""
    call = ("predict", "--task", "warm", "-")
    with started(*call, cwd=run.parent.parent, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for word in ("pink", "dog"):
            process.stdin.write(json.dumps({"word": word}) + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["task"] == "warm"
        process.stdin.write('{"wrd": 1}\n')
        process.stdin.close()
        assert process.wait(timeout=60) == 2
        assert process.stdout.read() == ""
        assert process.stderr.read() == (
            "error: stdin:3: task 'warm': prompt: the row has no field 'word'; it has: wrd; "
            "did you mean 'wrd'?\n"
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("rows.jsonl",), "give --task or --task-column: which task are the rows of?"),
        (("--task", "wram", "rows.jsonl"), "unknown task 'wram'; did you mean 'warm'?"),
        (("--task", "warm", "none.jsonl"), "none.jsonl: no such file"),
        (
            ("--task", "warm", "--format", "csv", "rows.jsonl"),
            "--format: expected one of jsonl, gl",
        ),
        (("--task", "warm", "--format", "glue", "rows.jsonl"), "expected one of glue/cola"),
        (("--task-column", "of", "--format", "glue", "rows.jsonl"), "a file for one task"),
        (("--task", "warm", "--task-column", "of", "rows.jsonl"), "not both"),
        (("--task-column", "off", "rows.jsonl"), "has no field 'off'; did you mean 'of'?"),
        (("--task", "all", "--task-column", "of", "rows.jsonl"), "not both"),
        (("--task", "warm,wram", "rows.jsonl"), "unknown task 'wram'; did you mean 'warm'?"),
        (("--task", "warm,warm", "rows.jsonl"), "--task: 'warm' stands twice"),
        (("--task", "all", "--format", "glue", "rows.jsonl"), "a file for one task"),
    ],
)
def test_what_cannot_be_predicted(
    run: Path, invoke: Callable[..., Finished], call: tuple[str, ...], message: str
) -> None:
    finished = invoke("predict", *call)
    assert finished.returncode == 2
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
