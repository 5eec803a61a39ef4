"""A folder of rows becomes a folder of answers: each row once, in its file's form, as `predict` answers it."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import signal
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.predict import Predictor
from mtl_lora_cli.prediction.course import Course
from mtl_lora_cli.prediction.desks import How
from mtl_lora_cli.prediction.in_hand import Fail, Question, Rows
from mtl_lora_cli.prediction.inputs import plan
from mtl_lora_cli.prediction.manifest import Output
from mtl_lora_cli.prediction.order import Order, opened_work
from mtl_lora_cli.prediction.reading import Chunk
from mtl_lora_cli.prediction.writing import PartFile
from mtl_lora_cli.runs.folder import RunFolder

from .conftest import rows_of

MIXED = How(task_column="of")
Answer = Callable[..., dict[str, bytes]]


def contents(output: Path) -> dict[str, bytes]:
    """Every file of answers, by its path."""
    return {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and not path.name.startswith(("_", "."))
    }


@pytest.fixture
def order(tmp_path: Path) -> Order:
    return Order(tmp_path / "rows", tmp_path / "out", MIXED, {}, part_rows=10)


@pytest.fixture
def answer(run_folder: RunFolder, predictor: Predictor) -> Answer:
    """`answer(order, parts)` answers so many parts, or all."""
    opened = Run(run_folder, instead=predictor._opened.packed)

    def run(order: Order, parts: int | None = None, **given: Any) -> dict[str, bytes]:
        with opened_work(opened, order) as work:
            course = Course(opened, work.job, **given)
            try:
                work.follow(course.run(work.missing[:parts]))
                if not work.missing:
                    work.finish()
                work.write_errors()
            finally:
                course.close()
        return contents(order.output)

    return run


def test_json_lines_keep_their_text_and_get_predict_s_answers(
    order: Order, answer: Answer, predictor: Predictor, tmp_path: Path
) -> None:
    rows = rows_of(24)
    (tmp_path / "rows" / "deep").mkdir(parents=True)
    # Numbers and spaces as no program writes them again.
    lines = [f' {json.dumps(row)[:-1]}, "x": 1.10e2 }} ' for row in rows]
    packed = gzip.compress("\n".join([*lines[:13], "", *lines[13:]]).encode())
    (tmp_path / "rows" / "deep" / "one.jsonl.gz").write_bytes(packed)
    found = answer(order)
    assert list(found) == [f"deep/one-{n:05d}.jsonl" for n in range(3)]
    said = b"".join(found.values()).decode().splitlines()
    expected = predictor.predict(rows, task_column="of")
    for line, text, right in zip(said, lines, expected, strict=True):
        assert line.startswith(text.strip()[:-2])
        own = json.loads(line)["prediction"]
        assert (own["task"], own["label"]) == (right["task"], right["label"])
        assert own["probabilities"] == pytest.approx(right["probabilities"], abs=1e-5)


def test_parquet_keeps_its_columns(
    order: Order, answer: Answer, predictor: Predictor, tmp_path: Path
) -> None:
    rows = rows_of(33)
    table = pyarrow.Table.from_pylist(rows).append_column(
        "when", pyarrow.array(range(33), pyarrow.timestamp("us", "UTC"))
    )
    (tmp_path / "rows").mkdir()
    parquet.write_table(table, tmp_path / "rows" / "one.parquet", row_group_size=7)
    parquet.write_table(table, tmp_path / "rows" / "two.parquet", row_group_size=33)
    found = answer(order)
    assert len(found) == 5 + 4  # of groups of seven; of one that is cut
    said = parquet.read_table(tmp_path / "out")  # what begins with _ is passed over
    assert said.drop_columns(["prediction"]).equals(pyarrow.concat_tables([table, table]))
    expected = predictor.predict(rows, task_column="of")
    assert pyarrow.types.is_int64(said.schema.field("prediction").type.field("label").type)
    for own, right in zip(said["prediction"].to_pylist(), expected * 2, strict=True):
        assert (own["task"], own["label"], own["answer"]) == (
            right["task"],
            right["label"],
            right["answer"],
        )
        assert dict(own["probabilities"]) == pytest.approx(right["probabilities"], abs=1e-5)
        assert own["truncated"] is False


@pytest.mark.parametrize("how", [How(["warm", "cold", "free"]), How("free")])
def test_several_tasks_a_row_and_free_answers(
    how: How, order: Order, answer: Answer, predictor: Predictor, write_lines: Any, tmp_path: Path
) -> None:
    rows = rows_of(11)
    write_lines("one.jsonl", rows)
    said = b"".join(answer(replace(order, how=how)).values()).decode().splitlines()
    expected = predictor.predict(rows, task=how.task)
    (tmp_path / "rows" / "one.jsonl").unlink()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows" / "one.parquet")
    answer(replace(order, how=how, output=tmp_path / "table"))
    table = parquet.read_table(tmp_path / "table")["prediction"].to_pylist()
    for line, right, cell in zip(said, expected, table, strict=True):
        own = json.loads(line)["prediction"]
        names = how.task if isinstance(how.task, list) else []
        for mine, theirs, column in zip(
            [own[n] for n in names] or [own],
            [right[n] for n in names] or [right],
            [cell[n] for n in names] or [cell],
            strict=True,
        ):
            assert mine["answer"] == theirs["answer"] == column["answer"]
            assert mine.keys() == theirs.keys() <= column.keys()


def test_what_is_drawn_depends_on_the_row_alone(
    order: Order, answer: Answer, write_lines: Any, tmp_path: Path
) -> None:
    write_lines("b.jsonl", rows_of(15))
    drawn = replace(order, how=How("free", temperature=1.0, seed=3, answers=2))
    found = answer(drawn)
    write_lines("a.jsonl", rows_of(3))  # stands before it
    again = answer(replace(drawn, output=tmp_path / "again"))
    assert {name: again[name] for name in found} == found
    texts = [
        json.loads(line)["prediction"]["answers"]
        for line in found["b-00000.jsonl"].split(b"\n")[:-1]
    ]
    assert len({text for some in texts for text in some}) > 2


def test_it_goes_on_where_it_ended_and_the_end_is_the_same(
    order: Order, answer: Answer, write_lines: Any, tmp_path: Path
) -> None:
    for name in ("one.jsonl", "two.jsonl"):
        write_lines(name, rows_of(25))
    whole = answer(replace(order, output=tmp_path / "whole"))
    assert len(whole) == 6
    begun = answer(order, parts=2)
    assert len(begun) == 2
    journal = tmp_path / "out" / "_parts.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])  # the last line was cut off
    (tmp_path / "out" / ".two-00000.jsonl.x.partial").write_text("half")
    before = {name: (tmp_path / "out" / name).stat().st_ino for name in begun}
    assert answer(order) == whole
    kept = [n for n in begun if (tmp_path / "out" / n).stat().st_ino == before[n]]
    assert len(kept) == 1  # the other one's line was lost: it was answered again
    assert not list((tmp_path / "out").glob(".*"))
    lines = [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")]
    assert len(lines) == 6
    for line in lines:
        content = whole[line["file"]]
        assert (line["bytes"], line["rows"]) == (len(content), content.count(b"\n"))
        assert line["sha256"] == hashlib.sha256(content).hexdigest()
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["complete"] is True
    assert answer(order) == whole


def test_killed_and_gone_on_with(
    order: Order, answer: Answer, write_lines: Any, tmp_path: Path
) -> None:
    """By a signal that nobody handles, in the middle of whatever is done."""
    write_lines("one.jsonl", rows_of(200))
    whole = answer(replace(order, output=tmp_path / "whole"))
    seen = []
    for hundredths in (1, 3, 8, 15):
        if (child := os.fork()) == 0:
            signal.setitimer(signal.ITIMER_REAL, hundredths / 100)
            answer(order)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGALRM)
        found = contents(order.output) if order.output.exists() else {}
        assert found.items() <= whole.items()
        seen.append(len(found))
    assert answer(order) == whole
    assert seen == sorted(seen)


@pytest.mark.long
@pytest.mark.slow
def test_processes_prepare_the_same(
    order: Order,
    answer: Answer,
    write_lines: Any,
    tmp_path: Path,
    run_folder: RunFolder,
    predictor: Predictor,
) -> None:
    """As on a card."""
    write_lines("one.jsonl", rows_of(45))
    expected = answer(order)
    other = replace(order, output=tmp_path / "other")
    assert answer(other, lanes=2, processes=True) == expected
    ended = replace(order, output=tmp_path / "ended")
    opened = Run(run_folder, instead=predictor._opened.packed)
    with opened_work(opened, ended) as work:  # lanes are ended in the middle of something
        course = Course(opened, work.job, 2, processes=True)
        work.follow([next(course.run(work.missing))])
        work.follow(course.close())
    assert not list(ended.output.rglob(".*"))
    assert contents(ended.output).items() <= expected.items()
    assert answer(ended, processes=True) == expected
    write_lines("one.jsonl", [*rows_of(45), {"of": "warm"}])
    with pytest.raises(
        UsageError, match=r"one\.jsonl:46: task 'warm': prompt: the row has no field"
    ):
        answer(replace(order, output=tmp_path / "bad"), lanes=2, processes=True)


def test_what_is_done_is_told_before_further_questions_are_answered(
    order: Order, write_lines: Any, run_folder: RunFolder, predictor: Predictor
) -> None:
    """Many may wait, a second each: parts would be noted down, and faults told, that much later."""
    write_lines("one.jsonl", rows_of(3))
    opened = Run(run_folder, instead=predictor._opened.packed)
    with opened_work(opened, order) as work:
        course = Course(opened, work.job)
        questions = [Question([], Future()) for _ in range(3)]
        fault = Fail(ValueError("a row"))
        for message in (*questions[:2], Rows(7), questions[2], fault):
            course._inbox.put(message)
        assert [course._next() for _ in range(5)] == [Rows(7), fault, *questions]
        course.close()


def test_a_part_that_cannot_be_noted_down_ends_the_work(
    order: Order, answer: Answer, write_lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is noted down beside the model's thread, which is told; the part is answered again, and the file is the same."""
    write_lines("one.jsonl", rows_of(45))
    with monkeypatch.context() as full:
        full.setattr(Output, "add", lambda self, done: os.write(-1, b"x"))
        with pytest.raises(OSError, match="Bad file descriptor"):
            answer(order)
    assert not Output(order.output).done()
    found = answer(order)
    assert len(found) == 5 and set(Output(order.output).done()) == {
        name.removesuffix(".jsonl") for name in found
    }


def test_other_rows_runs_and_options_are_refused(
    order: Order, answer: Answer, write_lines: Any, tmp_path: Path, run_folder: RunFolder
) -> None:
    rows = rows_of(20)
    path = write_lines("one.jsonl", rows)
    answer(order, parts=1)
    done = contents(order.output)
    for changed, message in (
        (replace(order, how=How("warm")), "was begun without --task, received warm"),
        (replace(order, part_rows=5), "was begun with --part-rows 10, received 5"),
        (replace(order, column="p"), "was begun with --answer-column prediction, received p"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            answer(changed)
    write_lines("one.jsonl", [{**rows[0], "word": "rod 0"}, *rows[1:]])
    with pytest.raises(UsageError, match=r"one\.jsonl: has changed since .*, rows 1 to 10; give"):
        answer(order)
    path.unlink()
    write_lines("two.jsonl", rows)
    with pytest.raises(UsageError, match="a file of the input: is gone since"):
        answer(order)
    path.with_name("two.jsonl").rename(path)
    changed_run = json.loads(run_folder.tasks.read_text())
    manifest = tmp_path / "out" / "_manifest.json"
    content = json.loads(manifest.read_text())
    content["run"]["checkpoint"] = "0"
    manifest.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="was begun with another run: its checkpoint was 0"):
        answer(order)
    assert changed_run
    assert contents(order.output) == done  # nothing was touched


def test_a_mended_row_and_a_new_file_are_gone_on_with(
    order: Order, answer: Answer, write_lines: Any, tmp_path: Path
) -> None:
    rows = rows_of(20)
    path = write_lines("one.jsonl", rows)
    text = path.read_text()
    path.write_text(text.replace('"word": "tree 13"', '"wrd": 1'))
    with pytest.raises(UsageError, match=r"one\.jsonl:14: task 'cold': prompt: the row has no"):
        answer(order)
    path.write_text(text)
    write_lines("two.jsonl", rows_of(3))
    assert list(answer(order)) == ["one-00000.jsonl", "one-00001.jsonl", "two-00000.jsonl"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_bad_rows_are_listed(
    form: str, order: Order, answer: Answer, write_lines: Any, tmp_path: Path
) -> None:
    rows = rows_of(20)
    rows[3]["of"] = "wram"
    rows[7]["word"] = None
    if form == "jsonl":
        path = write_lines("one.jsonl", rows)
        path.write_text(path.read_text().replace('{"id": 15,', "{id 15"))
    else:
        (tmp_path / "rows").mkdir()
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows" / "one.parquet")
    lenient = replace(order, errors=tmp_path / "bad.jsonl")
    answer(lenient)
    bad = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    expected = [4, 8, 16] if form == "jsonl" else [4, 8]
    assert [(one["file"], one["row"]) for one in bad] == [(f"one.{form}", n) for n in expected]
    assert "of: unknown task 'wram'; did you mean 'warm'?" in bad[0]["error"]
    if form == "jsonl":
        said = b"".join(contents(order.output).values()).decode().splitlines()
        ids = [json.loads(line)["id"] for line in said]
    else:
        ids = parquet.read_table(order.output)["id"].to_pylist()
    assert ids == [n for n in range(20) if n + 1 not in expected]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "expected files that end in .jsonl, .jsonl.gz, .jsonl.zst, .ndjson"),
        ({"a.csv": "x"}, "received a.csv"),
        ({"a.jsonl": "", "b.parquet": ""}, "expected Parquet or JSON lines, received both"),
        ({"a.jsonl": "{}\n", "a.ndjson": "{}\n"}, "would be written to files of one name"),
        ({"a.jsonl": ""}, "has no rows"),
        ({"a.parquet": "no"}, "a.parquet: cannot be read"),
        ({"a.jsonl.gz": "no"}, "a.jsonl.gz: not a whole gzip file"),
        ({"a.jsonl": '{"prediction": 1}\n'}, "a.jsonl:1: has a field 'prediction' already"),
        ({"a.jsonl": "[1]\n"}, "a.jsonl:1: expected an object for each row, received [1]"),
    ],
)
def test_what_is_no_folder_of_rows(
    files: dict[str, str], message: str, order: Order, answer: Answer, tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    for name, text in {**files, "_SUCCESS": "", "picture.png": "x"}.items():
        (tmp_path / "rows" / name).write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        answer(order)
    assert contents(tmp_path / "out") == {} if (tmp_path / "out").exists() else True


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "one-00000.jsonl"
    held = PartFile(place, "prediction")
    before = held._file
    with (
        before,
        Path("/dev/full").open("wb") as held._file,
    ):  # every write to it fails: no space left
        chunk = Chunk([], [1], ['{"word": "red"}'], [])
        with pytest.raises(OSError, match="No space left") as raised:
            held.write(chunk, [{"label": 1}])
            held.close()
        assert raised.value.filename == str(place)
        held.drop()
    assert list(tmp_path.iterdir()) == []


def test_an_output_without_answers_takes_other_options(
    order: Order, answer: Answer, write_lines: Any
) -> None:
    write_lines("one.jsonl", [{**row, "prediction": 1} for row in rows_of(25)])
    with pytest.raises(UsageError, match="--answer-column names another"):
        answer(order)
    other = replace(order, column="said", part_rows=20)
    assert len(answer(other)) == 2
    with pytest.raises(UsageError, match="was begun with --part-rows 20, received 10"):
        answer(replace(other, part_rows=10))


def test_empty_lines_are_no_rows(
    order: Order, answer: Answer, write_lines: Any, run_folder: RunFolder
) -> None:
    path = write_lines("one.jsonl", rows_of(7))
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    (first, second) = answer(order).values()
    assert first.count(b"\n") + second.count(b"\n") == 7
    with opened_work(Run(run_folder), order) as work:
        assert (work.totals.rows, work.totals.done_rows) == (7, 7)


def test_a_folder_of_something_else_is_left_alone(
    order: Order, answer: Answer, write_lines: Any, tmp_path: Path
) -> None:
    write_lines("one.jsonl", rows_of(3))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"is not empty and has no _manifest\.json"):
        answer(order)
    assert contents(tmp_path / "out") == {"thesis.txt": b"mine"}


@pytest.mark.parametrize("ending", ["\n", ""])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("rows", [1, 3, 4, 100])
def test_parts_of_lines_are_all_of_the_file(
    rows: int, packed: str, ending: str, tmp_path: Path
) -> None:
    lines = [b"a", b"", b"bb", b"c", b"d", b"e"]
    text = b"\n".join(lines) + ending.encode()
    path = tmp_path / f"x.jsonl{packed}"
    if packed == ".gz":
        path.write_bytes(gzip.compress(text[:4]) + gzip.compress(text[4:]))
    elif packed == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(text)
    else:
        path.write_bytes(text)
    (file,) = plan(tmp_path, [path.name], rows, {})
    assert sum(part.rows for part in file.parts) == 6
    for part, after in zip(file.parts, [*file.parts[1:], None], strict=True):
        own = text[part.offset : len(text) if after is None else after.offset]
        assert own.rstrip(b"\n").split(b"\n") == lines[part.first : part.first + part.rows] or (
            own == b"\n"
        )
        assert part.digest == hashlib.sha256(own).hexdigest()
