"""Rows from every kind of source, and one clear line for everything that can be wrong with it."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtl_lora_cli.data import file_formats, sources
from mtl_lora_cli.data.sources import (
    Rows,
    available_splits,
    read_split,
    resolve,
    split_by_column,
    without_test,
)
from mtl_lora_cli.errors import ExitCode, MtlLoraError
from mtl_lora_cli.recipe.source import Source

ROWS = [{"q": "Is it?", "n": "1"}, {"q": "größer, ☃\n“two lines”", "n": "2"}, {"q": "", "n": "3"}]
ENDINGS = ".json, .jsonl, .ndjson, .csv, .tsv (each also .gz and .zst), .parquet, .arrow"

DROP = "; broken_rows: drop in the source leaves such rows out"
UNKNOWN = f"unknown ending, expected one of {ENDINGS}; a table needs a delimiter in its source"


def delimited(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def as_arrow(rows: list[dict[str, Any]]) -> bytes:
    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zipped(writer: Callable[[list[dict[str, Any]]], bytes], rows: list[dict[str, Any]]) -> bytes:
    return gzip.compress(writer(rows))


def zstd(writer: Callable[[list[dict[str, Any]]], bytes], rows: list[dict[str, Any]]) -> bytes:
    return bytes(pa.compress(writer(rows), "zstd", asbytes=True))


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".json": lambda rows: json.dumps(rows, indent=2).encode(),
    ".jsonl": as_lines,
    ".ndjson": as_lines,
    ".csv": lambda rows: delimited(rows, ","),
    ".tsv": lambda rows: delimited(rows, "\t"),
    ".parquet": as_parquet,
    ".arrow": as_arrow,
}
for _name in [".json", ".jsonl", ".ndjson", ".csv", ".tsv"]:
    WRITERS[f"{_name}.gz"] = partial(zipped, WRITERS[_name])
    WRITERS[f"{_name}.zst"] = partial(zstd, WRITERS[_name])


def read(folder: Path, name: str, content: bytes | str, **keys: Any) -> Rows:
    content = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(content)
    source = Source.model_validate({"path": name} | keys)
    rows = read_split(source, "train", base=folder, task="t")
    assert rows is not None
    return rows


def failure(action: Callable[[], Any]) -> str:
    """The one line that the user sees."""
    with pytest.raises(MtlLoraError) as caught:
        action()
    assert caught.value.exit_code == ExitCode.USAGE
    (line,) = caught.value.lines
    return line


def failure_of(folder: Path, name: str, content: bytes | str, **keys: Any) -> str:
    """The message for a file's content, without the folder in front."""
    return failure(lambda: read(folder, name, content, **keys)).removeprefix(f"{folder}/")


def quoting(ending: str) -> dict[str, str]:
    """What a source says of a TSV that was written as a CSV is."""
    return {"quoting": "csv"} if ".tsv" in ending else {}


# Formats


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    rows = read(tmp_path, f"data{ending}", WRITERS[ending](ROWS), **quoting(ending))
    assert list(rows.rows) == ROWS
    assert rows.notes == ()
    assert rows.file == str(tmp_path / f"data{ending}")


def test_all_endings_are_tested() -> None:
    assert set(file_formats.ENDINGS) == set(WRITERS)
    assert file_formats.KNOWN == ENDINGS


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", '\n{"q": 1}\r\n\n{"q": "\u2028"}', [":2", ":4"]),
        ("a.json", '[\n {"q":\n 1},\n\n {"q": 2}\n]\n', [":2", ":5"]),
        ("a.json", '[{"q": 1}, {"q": 2}]', [", row 1", ", row 2"]),
        ("a.json", '{"version": 1, "data": [{"q": 1}]}', [", row 1"]),
        ("a.csv", 'q\n"one\ntwo"\n\nthree\n', [":2", ":5"]),
        ("a.tsv.gz", gzip.compress(b"q\r\na\r\nb\r\n", mtime=0), [":2", ":3"]),
        ("a.parquet", as_parquet([{"q": 1}, {"q": 2}]), [", row 1", ", row 2"]),
    ],
)
def test_every_row_knows_its_place(
    tmp_path: Path, name: str, content: bytes | str, places: list[str]
) -> None:
    rows = read(tmp_path, name, content)
    assert [rows.where(index) for index in range(len(rows.rows))] == [
        f"{tmp_path / name}{place}" for place in places
    ]


def test_values_keep_their_types_where_the_format_has_types(tmp_path: Path) -> None:
    typed = [{"a": 1, "b": 0.5, "c": None, "d": True, "e": ["x"], "f": {"g": 2}}]
    for ending in (".json", ".jsonl", ".parquet"):
        assert list(read(tmp_path, f"a{ending}", WRITERS[ending](typed)).rows) == typed
    assert list(read(tmp_path, "a.csv", "a,b\n007,1.50\n").rows) == [{"a": "007", "b": "1.50"}]


def test_byte_order_mark_and_upper_case_ending(tmp_path: Path) -> None:
    for ending in (".json", ".jsonl", ".csv"):
        content = b"\xef\xbb\xbf" + WRITERS[ending](ROWS)
        assert list(read(tmp_path, f"a{ending.upper()}", content).rows) == ROWS


def test_lines_of_ten_megabytes(tmp_path: Path) -> None:
    long = [{"q": "x" * 10_000_000}]
    for ending in (".jsonl", ".csv"):
        assert list(read(tmp_path, f"a{ending}", WRITERS[ending](long)).rows) == long


def test_fingerprint_is_that_of_the_bytes(tmp_path: Path) -> None:
    first, same = (read(tmp_path, name, "q\na\n") for name in ("a.csv", "b.csv"))
    other = read(tmp_path, "c.csv", "q\nb\n")
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert hashlib.sha256(b"q\na\n").hexdigest().startswith(first.fingerprint)
    assert len(first.fingerprint) == 16


def test_a_large_array_is_read_in_seconds(tmp_path: Path) -> None:
    row = {"instruction": "Please choose " * 10, "input": "", "output": "yes", "answer": "yes"}
    content = json.dumps([row] * 20_000, indent=1)
    start = time.process_time()
    assert len(read(tmp_path, "a.json", content).rows) == 20_000
    assert time.process_time() - start < 3  # a tenth of it on an idle machine


# What is wrong with a file


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", "", "a.jsonl: has no rows, expected at least one"),
        ("a.jsonl", "\n \n", "a.jsonl: has no rows, expected at least one"),
        ("a.json", "", "a.json: has no rows, expected at least one"),
        ("a.json", "[ ]", "a.json: has no rows, expected at least one"),
        ("a.json", '{"data": []}', "a.json: has no rows, expected at least one"),
        ("a.csv", "", "a.csv: has no rows, expected at least one"),
        ("a.csv", "q,n\n", "a.csv: has no rows, expected at least one"),
        ("a.csv.gz", gzip.compress(b"", mtime=0), "a.csv.gz: has no rows, expected at least one"),
        (
            "a.parquet",
            as_parquet([{"q": 1}][:0]),
            "a.parquet: has no rows, expected at least one",
        ),
        (
            "a.jsonl",
            '{"q": 1}\n{"q": }\n',
            "a.jsonl:2: not valid JSON: expecting value (column 7)",
        ),
        (
            "a.jsonl",
            '{"q": 1}\n{"q": 1} {"q": 2}\n',
            "a.jsonl:2: not valid JSON: more after the end (column 10)",
        ),
        (
            "a.jsonl",
            '{"q": 1}\n{"q": 1, "n": 2, "q": 3}',
            "a.jsonl:2: not valid JSON: the key 'q' stands twice (column 1)",
        ),
        (
            "a.jsonl",
            '{"q": {"a": 1, "a": 1}}',
            "a.jsonl:1: not valid JSON: the key 'a' stands twice (column 1)",
        ),
        (
            "a.jsonl",
            '{"q": NaN}',
            "a.jsonl:1: not valid JSON: expected a number or null, received NaN (column 1)",
        ),
        (
            "a.jsonl",
            '{"q": "\\ud83d\\ude00"}\n{"q": "\\ud83d"}',
            "a.jsonl:2: not valid JSON: 'utf-8' codec can't encode character '\\ud83d' "
            "in position 7: surrogates not allowed (column 1)",
        ),
        (
            "a.jsonl",
            '{"q": 1}\n\n[1, 2]\n',
            "a.jsonl:3: expected an object for each row, received [1, 2]",
        ),
        ("a.json", "[\n{},\n3]", "a.json:3: expected an object for each row, received 3"),
        ("a.json", "[{}, null]", "a.json, row 2: expected an object for each row, received None"),
        (
            "a.json",
            '{"data": ["x"]}',
            "a.json, row 1: expected an object for each row, received 'x'",
        ),
        (
            "a.json",
            '[\n{"q": 1}\n{"q": 2}]',
            "a.json:3: not valid JSON: expected ',' or ']' (column 1)",
        ),
        ("a.json", '[\n{"q": 1},\n]', "a.json:3: not valid JSON: expecting value (column 1)"),
        ("a.json", '[\n{"q": 1}', "a.json:2: not valid JSON: expected ',' or ']' (column 9)"),
        ("a.json", "[]\n[]", "a.json:2: not valid JSON: more after the end (column 1)"),
        (
            "a.json",
            '[\n{"q": 1},\n{"q":\n2, "q": 3}]',
            "a.json:3: not valid JSON: the key 'q' stands twice (column 1)",
        ),
        (
            "a.json",
            '{"q": 1}\n{"q": 2}\n',
            "a.json:2: not valid JSON: more after the end; "
            "a file with an object on each line is named .jsonl (column 1)",
        ),
        (
            "a.json",
            '{"rows": []}',
            "a.json: expected an array or {\"data\": [...]}, received {'rows': []}",
        ),
        ("a.json", "7", 'a.json: expected an array or {"data": [...]}, received 7'),
        ("a.csv", "q,n\n1,2\n3\n", f"a.csv:3: expected 2 columns (q, n), received 1{DROP}"),
        (
            "a.csv",
            'q,n\n"a\nb",2\n3,4,5\n',
            f"a.csv:4: expected 2 columns (q, n), received 3{DROP}",
        ),
        ("a.tsv", "q\tn\n1,2\n", f"a.tsv:2: expected 2 columns (q, n), received 1{DROP}"),
        ("a.csv", "q,n,q\n1,2,3\n", "a.csv:1: the column 'q' stands twice"),
        ("a.csv", "q,n\n1,\x002\n", "a.csv:2: not text: has a null byte"),
        ("a.jsonl", '{"q": 1}\n\0', "a.jsonl:2: not text: has a null byte"),
        ("a.csv", b"q\na\nb\xff\n", "a.csv:3: not UTF-8 text: byte 0xff"),
        (
            "a.jsonl",
            '{"q": "ä"}'.encode("latin-1"),
            "a.jsonl:1: not UTF-8 text: byte 0xe4",
        ),
        (
            "a.json",
            '[{"q": 1}]'.encode("utf-16"),
            "a.json:1: not UTF-8 text: byte 0xff",
        ),
        (
            "a.jsonl.gz",
            b"{}",
            "a.jsonl.gz: not a whole gzip file: Not a gzipped file (b'{}')",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"q": 1}', mtime=0)[:-9],
            "a.jsonl.gz: not a whole gzip file: "
            "Compressed file ended before the end-of-stream marker was reached",
        ),
        (
            "a.csv.gz",
            gzip.compress(b"q,n\n1\n", mtime=0),
            f"a.csv.gz:2: expected 2 columns (q, n), received 1{DROP}",
        ),
        ("a.txt", "q", f"a.txt: {UNKNOWN}"),
        ("a", "q", f"a: {UNKNOWN}"),
    ],
)
def test_a_broken_file_is_one_line(
    tmp_path: Path, name: str, content: bytes | str, expected: str
) -> None:
    assert failure_of(tmp_path, name, content) == expected


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", as_parquet(ROWS)[:-20], b"PAR1" + bytes(100) + b"PAR1"]
)
def test_a_broken_parquet_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    # The reason is pyarrow's own, and its words differ between versions.
    assert failure_of(tmp_path, "a.parquet", content).startswith(
        "a.parquet: not a whole Parquet file: "
    )


def test_a_parquet_column_that_stands_twice(tmp_path: Path) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["q", "q"]), sink)
    assert failure_of(tmp_path, "a.parquet", sink.getvalue()) == (
        "a.parquet: the column 'q' stands twice"
    )


def test_deep_nesting_is_one_line(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl"):
        message = failure_of(tmp_path, name, "[" * 200_000)
        assert message.startswith(f"{name}:1: not valid JSON: ")


# Folders, splits and samples


@pytest.mark.parametrize("validation", ["validation", "valid", "val", "dev"])
def test_a_folder_has_the_splits_that_its_files_name(tmp_path: Path, validation: str) -> None:
    (tmp_path / "train.jsonl").write_bytes(as_lines(ROWS))
    (tmp_path / f"{validation}.csv.gz").write_bytes(WRITERS[".csv.gz"](ROWS[:1]))
    (tmp_path / "train.md").write_text("about")
    (tmp_path / "training.jsonl").write_text("another")
    source = Source(path=str(tmp_path))
    assert available_splits(source, base=Path("nowhere"), task="t") == ("train", "validation")
    counts = [
        rows and len(rows.rows)
        for split in ("train", "validation", "test")
        for rows in [read_split(source, split, base=tmp_path, task="t")]
    ]
    assert counts == [3, 1, None]


def test_numbered_parts_are_one_split(tmp_path: Path) -> None:
    for number in (1, 0):
        name = f"train-0000{number}-of-00002.parquet"
        (tmp_path / name).write_bytes(as_parquet([ROWS[number]]))
    (tmp_path / "test-00000-of-00001-0a1b2c.parquet").write_bytes(as_parquet(ROWS))
    source = Source(path=".")
    rows = read_split(source, "train", base=tmp_path, task="t")
    assert rows is not None
    assert list(rows.rows) == ROWS[:2]
    assert rows.file == f"{tmp_path}/train-00000-of-00002.parquet and 1 more"
    assert rows.where(1) == f"{tmp_path}/train-00001-of-00002.parquet, row 1"
    assert available_splits(source, base=tmp_path, task="t") == ("train", "test")
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    assert failure(lambda: available_splits(source, base=tmp_path, task="t")) == (
        f"{tmp_path}: source of task 't': expected one file for train, or all its numbered parts; "
        "received train-00000-of-00002.parquet"
    )


def test_a_test_split_can_be_left_out(tmp_path: Path) -> None:
    """The other splits' rows are the same, in however many files; nothing of the test split is known."""
    for number, row in enumerate(ROWS):
        (tmp_path / f"train-0000{number}-of-00003.jsonl").write_bytes(as_lines([row]))
    for name in ("valid.jsonl.gz", "test.jsonl"):
        (tmp_path / name).write_bytes(zipped(as_lines, ROWS[:1]))
    whole = Source(path=str(tmp_path))
    source = without_test(whole, base=Path(), task="t")
    (tmp_path / "test.jsonl").unlink()
    assert available_splits(source, base=Path(), task="t") == ("train", "validation")
    for split in ("train", "validation"):
        one, other = (read_split(s, split, base=Path(), task="t") for s in (source, whole))
        assert one is not None and one == other
    assert len(read_split(source, "train", base=Path(), task="t").rows) == 3  # type: ignore[union-attr]


def test_a_test_split_of_named_splits_is_left_out(tmp_path: Path) -> None:
    named = Source(hub="owner/name", splits={"train": "train", "test": "test[:10]"})
    assert without_test(named, base=Path(), task="t").splits == {"train": "train"}


def test_a_single_file_is_the_train_split(tmp_path: Path) -> None:
    source = Source(path="a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(as_lines(ROWS))
    assert available_splits(source, base=tmp_path, task="t") == ("train",)
    assert read_split(source, "test", base=tmp_path, task="t") is None


def test_splits_name_files_or_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "data [1]"  # brackets in the folder are no pattern
    (folder / "more").mkdir(parents=True)
    (folder / "b.jsonl").write_bytes(as_lines(ROWS[1:]))
    (folder / "a.jsonl").write_bytes(as_lines(ROWS[:1]))
    (folder / "more" / "x[1].csv").write_bytes(WRITERS[".csv"](ROWS))
    (tmp_path / "b.ndjson").write_bytes(as_lines(ROWS[1:]))
    source = Source(
        path=folder.name,
        splits={"train": "?.jsonl", "validation": "more/x[1].csv", "test": f"{tmp_path}/[a-c].*"},
    )
    assert available_splits(source, base=tmp_path, task="t") == ("train", "validation", "test")
    train = read_split(source, "train", base=tmp_path, task="t")
    assert train is not None
    assert list(train.rows) == ROWS
    assert [train.where(index).removeprefix(f"{folder}/") for index in range(3)] == [
        "a.jsonl:1",
        "b.jsonl:1",
        "b.jsonl:2",
    ]
    validation = read_split(source, "validation", base=tmp_path, task="t")
    test = read_split(source, "test", base=tmp_path, task="t")
    assert validation is not None
    assert test is not None
    assert list(validation.rows) == ROWS
    assert list(test.rows) == ROWS[1:]
    assert len({train.fingerprint, validation.fingerprint, test.fingerprint}) == 3


@pytest.mark.parametrize(
    ("files", "source", "expected"),
    [
        ([], {"path": "data"}, "data: source of task 't': no such file or folder"),
        ([], {"path": "a.jsonl"}, "a.jsonl: source of task 't': no such file or folder"),
        (
            ["a.jsonl"],
            {"path": "a.jsonl", "splits": {"test": "b.jsonl"}},
            "a.jsonl: source of task 't': 'splits' goes with a folder, received a file",
        ),
        (
            ["data/train.txt", "data/other.jsonl"],
            {"path": "data"},
            "data: source of task 't': expected train.*, validation.* or test.* with the ending "
            f"{ENDINGS}; received other.jsonl, train.txt",
        ),
        (
            ["data/none/x"],
            {"path": "data"},
            "data: source of task 't': expected train.*, validation.* or test.* with the ending "
            f"{ENDINGS}; received none",
        ),
        (
            ["data/dev.csv", "data/train.csv", "data/valid.csv"],
            {"path": "data"},
            "data: source of task 't': expected one file for validation, or all its numbered "
            "parts; received dev.csv, valid.csv",
        ),
        (
            ["data/train.csv", "data/train.v2.csv"],
            {"path": "data"},
            "data: source of task 't': expected one file for train, or all its numbered "
            "parts; received train.csv, train.v2.csv",
        ),
        (
            ["data/train.csv"],
            {"path": "data", "splits": {"train": "train.csv", "test": "te*.csv"}},
            "data: source of task 't': splits.test: no file matches 'te*.csv'",
        ),
        (
            ["data/train.txt"],
            {"path": "data", "splits": {"train": "train.txt"}},
            f"data/train.txt: {UNKNOWN}",
        ),
    ],
)
def test_a_wrong_folder_is_one_line(
    tmp_path: Path, files: list[str], source: dict[str, Any], expected: str
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("q\n1\n")
    message = failure(lambda: read_split(Source(**source), "train", base=tmp_path, task="t"))
    assert message == f"{tmp_path}/{expected}"


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    source = Source(path="x" * 300)
    assert failure(lambda: available_splits(source, base=tmp_path, task="t")).endswith(
        ": source of task 't': cannot be read: File name too long"
    )


def test_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "bundled", lambda name: tmp_path / name)
    for name in ("colours", "sums"):
        folder = tmp_path / "data_templates" / "samples" / name
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_bytes(as_lines(ROWS))
        (folder / "test.jsonl").write_bytes(as_lines(ROWS[:1]))
    source = Source.model_validate("sample:sums")
    assert available_splits(source, base=tmp_path, task="t") == ("train", "test")
    rows = read_split(source, "test", base=tmp_path, task="t")
    assert rows is not None
    assert list(rows.rows) == ROWS[:1]
    for name, hint in (
        ("colors", "did you mean 'colours'?"),
        ("zz", "known samples: colours, sums"),
    ):
        wrong = Source(sample=name)
        assert failure(partial(available_splits, wrong, base=tmp_path, task="t")) == (
            f"source of task 't': unknown sample '{name}'; {hint}"
        )


def test_resolve_makes_the_path_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = Source(path="../data", splits={"train": "a.csv"})
    resolved = resolve(source, base=Path("recipes/glue"))
    assert resolved == Source(path=str(tmp_path / "recipes/data"), splits={"train": "a.csv"})
    assert resolve(resolved, base=Path("elsewhere")) == resolved
    for other in (Source(sample="sums"), Source(hub="owner/name", revision="v1")):
        assert resolve(other, base=tmp_path) == other


# One file for several tasks


def test_split_by_column_keeps_order_and_lines(tmp_path: Path) -> None:
    lines = [{"task_id": number, "n": index} for index, number in enumerate((1, 0, 1, 2, 0))]
    rows = read(tmp_path, "a.json", json.dumps(lines, indent=0))
    tasks = split_by_column(rows, "task_id", {"0": "boolq", "1": "piqa", "2": "boolq"})
    assert {task: [row["n"] for row in part.rows] for task, part in tasks.items()} == {
        "piqa": [0, 2],
        "boolq": [1, 3, 4],
    }
    assert list(tasks) == ["piqa", "boolq"]
    assert tasks["boolq"].where(1) == rows.where(3) == f"{tmp_path}/a.json:14"
    assert len({rows.fingerprint, *(part.fingerprint for part in tasks.values())}) == 3

    floats = read(tmp_path, "b.csv", "task_id,n\n1.0,0\n0.0,1\n2,2\n")
    tasks = split_by_column(
        floats, "task_id", {"0": "boolq", "1": "piqa", "2": "piqa", "1.00": "x"}
    )
    assert {task: len(part.rows) for task, part in tasks.items()} == {"piqa": 2, "boolq": 1}

    by_value = split_by_column(rows, "task_id", None)
    assert {task: len(part.rows) for task, part in by_value.items()} == {"1": 2, "0": 2, "2": 1}
    words = read(tmp_path, "a.csv", "task\nb\na\nb\n")
    assert list(split_by_column(words, "task", None)) == ["b", "a"]


@pytest.mark.parametrize(
    ("row", "names", "expected"),
    [
        ('{"task_id": 9}', {"0": "a", "1": "b"}, "expected one of 0, 1, received 9"),
        ('{"task_id": "x"}', {"0": "a"}, "expected one of 0, received 'x'"),
        ('{"task_id": "1.05"}', {"0": "a", "15": "b"}, "expected one of 0, 15, received '1.05'"),
        ('{"task_id": "v1.0"}', {"0": "a", "v1": "b"}, "expected one of 0, v1, received 'v1.0'"),
        ('{"other": 9}', {"0": "a"}, "expected one of 0, the row does not have it"),
        ('{"other": 9}', None, "expected a task's id or name, the row does not have it"),
        ('{"task_id": 0.0}', None, "expected a task's id or name, received 0.0"),
        ('{"task_id": true}', None, "expected a task's id or name, received True"),
        ('{"task_id": null}', None, "expected a task's id or name, received None"),
        ('{"task_id": ""}', None, "expected a task's id or name, received ''"),
        ('{"task_id": [1]}', None, "expected a task's id or name, received [1]"),
    ],
)
def test_a_row_of_no_known_task_is_one_line(
    tmp_path: Path, row: str, names: dict[str, str] | None, expected: str
) -> None:
    rows = read(tmp_path, "a.jsonl", f'{{"task_id": 0}}\n{row}\n')
    assert failure(lambda: split_by_column(rows, "task_id", names)) == (
        f"{tmp_path}/a.jsonl:2: task_id: {expected}"
    )


def test_a_fingerprint_is_what_it_was_for_runs_that_remember_it(tmp_path: Path) -> None:
    """As written in 0.1.0's first plans; only a source that says how its files are written differs."""
    (tmp_path / "train.jsonl").write_bytes(b'{"a": 1}\n')
    plain = Source(path=str(tmp_path))
    content = hashlib.sha256(b'{"a": 1}\n').hexdigest()[:16]
    expected = hashlib.sha256(f"{content} None None None".encode()).hexdigest()[:16]
    assert sources.split_fingerprint(plain, "train", base=tmp_path, task="t") == expected
    other = plain.model_copy(update={"quoting": "none"})
    assert sources.split_fingerprint(other, "train", base=tmp_path, task="t") != expected


# Whole data sets, and anything at all


def test_files_have_the_rows_that_their_manifest_says(each_data_folder: Path) -> None:
    manifest = json.loads((each_data_folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest
    for entry in manifest:
        file = Path(entry["file"])
        source = Source(path=str(file.parent))
        split = file.name.partition(".")[0]
        rows = read_split(source, split, base=each_data_folder, task="t")
        assert rows is not None
        assert len(rows.rows) == entry["rows"], file
        assert set(rows.rows[0]) == set(entry["fields"]), file
        assert rows.where(len(rows.rows) - 1) == f"{each_data_folder / file}:{entry['rows']}"


text = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"))
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | text
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=3
)
every_time = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50
)


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, str]]:
    columns = draw(st.lists(text, min_size=1, max_size=4, unique=True))
    row = st.fixed_dictionaries(dict.fromkeys(columns, text))
    return draw(st.lists(row, min_size=1, max_size=5))


@every_time
@given(rows=st.lists(st.dictionaries(text, values), min_size=1), indent=st.none() | st.just(1))
def test_json_comes_back_as_it_was(
    tmp_path: Path, rows: list[dict[str, Any]], indent: int | None
) -> None:
    for ascii_only in (True, False):
        array = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
        assert list(read(tmp_path, "a.json", array).rows) == rows
        assert list(read(tmp_path, "b.json", f'{{"data": {array}}}').rows) == rows
        lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
        assert list(read(tmp_path, "a.jsonl", lines).rows) == rows


@every_time
@given(rows=tables())
def test_tables_come_back_as_they_were(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    for ending in (".csv", ".tsv.gz", ".parquet", ".arrow"):
        delimiter = {".csv": ",", ".tsv.gz": "tab"}.get(ending)
        keys = quoting(ending) | ({"delimiter": delimiter} if delimiter else {})
        found = read(tmp_path, f"a{ending}", WRITERS[ending](rows), **keys)
        assert list(found.rows) == rows


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """A file that was right before some of its bytes were lost or replaced."""
    cut = st.integers(0, len(content))
    return st.builds(
        lambda start, end, middle: content[:start] + middle + content[end:], cut, cut, st.binary()
    )


@every_time
@given(data=st.data())
@pytest.mark.parametrize("ending", WRITERS)
def test_any_bytes_are_rows_or_one_line(tmp_path: Path, ending: str, data: st.DataObject) -> None:
    content = data.draw(st.binary() | damaged(WRITERS[ending](ROWS)))
    try:
        rows = read(tmp_path, f"a{ending}", content)
    except MtlLoraError as error:
        assert len(error.lines) == 1
        assert error.exit_code == ExitCode.USAGE
    else:
        assert len(rows.rows) == len(rows.places) > 0
