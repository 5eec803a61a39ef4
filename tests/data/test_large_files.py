"""Large files: read where rows are asked for, they give what they give when they are read whole."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import csv as arrow_csv
from pyarrow import ipc, parquet

from mtl_lora_cli.data import large_files, lazy_rows
from mtl_lora_cli.data.delimited import BY_ENDING, Layout
from mtl_lora_cli.data.file_formats import read_file
from mtl_lora_cli.data.large_files import read_rows
from mtl_lora_cli.data.lazy_rows import Lazy
from mtl_lora_cli.data.sources import read_split
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.source import Source

ROWS = [
    {"text": f"row {n} é\u2028 \"{n}\"" + "!" * (n % 9), "label": n % 3, "more": [n, None]}
    for n in range(1400)
]  # fmt: skip


@pytest.fixture(autouse=True)
def _all_is_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(large_files, "LARGE", 0)
    monkeypatch.setattr(large_files, "_BLOCK", 1000)
    monkeypatch.setattr(large_files, "_BATCH", 100)
    monkeypatch.setattr(lazy_rows, "_BLOCK", 64)
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path))


def json_lines() -> bytes:
    lines = [json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(ROWS)]
    for place in (0, 3, 700):
        lines.insert(place, " \t" if place else "")
    lines[10] = "  " + lines[10]
    return "\n".join(lines).encode() + b"\r\n\n"


def table(delimiter: str, quote: bool) -> bytes:
    lines = [delimiter.join(["text", "label"])]
    for n in range(1400):
        text = f"row {n} é"
        if quote and n % 5 == 0:
            text = f'"row {n}{delimiter} ""so""\n\nand more"'
        lines += [f"{text}{delimiter}{n % 3}", *([""] if n % 100 == 0 else [])]
    return b"\xef\xbb\xbf" + "\r\n".join(lines).encode()


def arrow(stream: bool) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        whole = pyarrow.Table.from_pylist(ROWS)
        with (ipc.new_stream if stream else ipc.new_file)(str(path), whole.schema) as out:
            out.write_table(whole, max_chunksize=333)

    return write


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, "zstd", asbytes=True))


FILES: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(json_lines()),
    "bom.ndjson": lambda path: path.write_bytes(b"\xef\xbb\xbf" + json_lines()),
    "a.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress(json_lines()[:5000]) + gzip.compress(json_lines()[5000:])
    ),
    "a.jsonl.zst": lambda path: path.write_bytes(zstd(json_lines())),
    "a.csv": lambda path: path.write_bytes(table(",", True)),
    "a.csv.zst": lambda path: path.write_bytes(zstd(table(",", True))),
    "a.tsv": lambda path: path.write_bytes(table("\t", False)),
    "a.tsv.gz": lambda path: path.write_bytes(gzip.compress(table("\t", False))),
    "a.parquet": lambda path: parquet.write_table(
        pyarrow.Table.from_pylist(ROWS), path, row_group_size=500
    ),
    "dictionary.parquet": lambda path: parquet.write_table(
        pyarrow.table({"t": pyarrow.array([str(n // 90) for n in range(900)]).dictionary_encode()}),
        path,
        row_group_size=70,
    ),
    "a.arrow": arrow(stream=False),
    "stream.arrow": arrow(stream=True),
}


@pytest.mark.parametrize("name", FILES)
def test_a_large_file_gives_what_it_gives_when_it_is_read_whole(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FILES[name](path)
    large, whole = read_rows(path), read_file(path)
    assert isinstance(large.rows, Lazy)
    assert list(large.rows) == list(whole.rows)
    assert list(large.places) == list(whole.places)
    assert (large.fingerprint, large.file) == (whole.fingerprint, whole.file)
    assert [large.rows[n] for n in (0, 7, -1)] == [whole.rows[n] for n in (0, 7, -1)]
    assert large.rows[60:200:7] == whole.rows[60:200:7]
    assert large.rows[5:5] == []
    for numbers in (np.arange(0, len(whole.rows), 3), np.array([2, 3, 700, 899])):
        assert large.some(numbers) == [whole.rows[n] for n in numbers]
    with pytest.raises(IndexError):
        large.rows[len(whole.rows)]
    read, wrote = os.pipe()
    if (child := os.fork()) == 0:  # as a process that encodes some of them
        os.write(wrote, json.dumps(large.rows[300:310]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert json.loads(os.read(read, 2**16)) == whole.rows[300:310]
    for handle in (read, wrote):
        os.close(handle)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("a.csv", Layout(columns={"text": "t", "label": "text"})),
        ("a.jsonl", Layout(columns={"more": "less"})),
        ("a.tsv", Layout(quoting="none", columns={"label": "l"})),
        ("x.txt", Layout(delimiter="|", columns=["a", "b"])),
        ("y.txt", Layout(delimiter=",", columns=["a", "b"], broken_rows="drop")),
    ],
)
def test_a_sources_keys_are_read_alike(name: str, layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / name
    if name in FILES:
        FILES[name](path)
    else:
        path.write_text(
            "".join(f"{n}{layout.delimiter}z\n" for n in range(300)) + "1\n" * ("y" in name)
        )
    large, whole = read_rows(path, layout), read_file(path, layout)
    assert list(large.rows) == list(whole.rows)
    assert list(large.places) == list(whole.places)
    assert large.fingerprint == whole.fingerprint
    assert [note.split(":")[1] for note in large.notes] == [
        note.split(":")[1] for note in whole.notes
    ]


BROKEN: dict[str, bytes] = {
    "json.jsonl": b'{"a": 1}\n' * 300 + b'{"a": }\n' + b'{"a": 1}\n' * 300,
    "list.jsonl": b'{"a": 1}\n' * 300 + b"[1]\n",
    "letters.jsonl": b'{"a": 1}\n' * 300 + b'{"a": "\xff"}\n',
    "null.tsv": b"a\tb\n" + b"1\t2\n" * 300 + b"1\t\0\n",
    "short.tsv": b"a\tb\n" + b"1\t2\n" * 300 + b"1\n" + b"1\t2\n" * 90,
    "short.csv": b"a,b\n" + b"1,2\n" * 300 + b'"1,\n\n"\n' + b"1,2\n" * 90,
    "quote.csv": b"a,b\n" + b"1,2\n" * 300 + b'"1,2\n' + b"1,2\n" * 90,
    "carriage.csv": b"a,b\r" + b"1,2\r" * 300 + b"1\r",
    "twice.csv": b"a,a\n" + b"1,2\n" * 300,
    "empty.jsonl": b"\n \n",
    "cut.jsonl.gz": gzip.compress(b'{"a": 1}\n' * 9000)[:-9],
    "cut.jsonl.zst": zstd(b'{"a": 1}\n' * 9000)[:-9],
    "no.parquet": b"PAR1 and no more",
    "no.arrow": b"ARROW1 and no more",
    "lfs.jsonl": b"version https://git-lfs.github.com/spec/v1\n" * 9,
    "unknown.xyz": b"1",
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_told_with_the_same_words(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    with pytest.raises(UsageError) as whole:
        read_file(path)
    with pytest.raises(UsageError) as large:
        list(read_rows(path).rows)
    if not name.startswith(("cut", "no.")):
        assert str(large.value) == str(whole.value)
    assert str(path) in str(large.value)


def test_parts_and_a_task_column_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    rows = [{"text": f"row {n}", "task": "ab"[n % 7 == 0]} for n in range(500)]
    for part in range(2):
        lines = "".join(json.dumps(row) + "\n" for row in rows[part * 300 :][:300])
        (tmp_path / f"train-0000{part}-of-00002.jsonl").write_text(lines, encoding="utf-8")
    found = read_split(Source(path=str(tmp_path)), "train", base=Path(), task="t")
    assert found is not None and isinstance(found.rows, Lazy)
    assert list(found.rows) == rows
    assert found.where(299).endswith("train-00000-of-00002.jsonl:300")
    assert found.where(300).endswith("train-00001-of-00002.jsonl:1")
    column = Source(path=str(tmp_path), task_column="task", task="b")
    own = read_split(column, "train", base=Path(), task="t")
    assert own is not None and isinstance(own.rows, Lazy)
    assert list(own.rows) == rows[::7]
    assert own.where(43).endswith("train-00001-of-00002.jsonl:2")
    assert own.places[42:44] == [own.where(42), own.where(43)]


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 100)
    rows = read_rows(path).rows
    path.write_bytes(b'{"a": 1}\n' * 50)
    with pytest.raises(UsageError, match="was changed while it was read"):
        list(rows)


def test_arrow_reads_what_these_tests_wrote(tmp_path: Path) -> None:
    """Another reader of the same table: the rows above are what they are meant to be."""
    path = tmp_path / "a.tsv"
    path.write_bytes(table("\t", False))
    options = arrow_csv.ParseOptions(delimiter="\t", quote_char=False)
    theirs = arrow_csv.read_csv(path, parse_options=options).to_pylist()
    ours: list[Any] = list(read_rows(path, BY_ENDING).rows)
    assert [(row["text"], int(row["label"])) for row in ours] == [tuple(r.values()) for r in theirs]


@pytest.mark.parametrize(("ending", "packed"), [("gz", gzip.compress), ("zst", zstd)])
def test_a_packed_file_that_is_damaged_inside_is_one_line(
    ending: str, packed: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path, whole = tmp_path / f"a.jsonl.{ending}", bytearray(packed(json_lines()))
    middle = len(whole) // 2
    for content in (whole[:middle], whole[:10] + b"\xff" * 8 + whole[18:]):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=rf"a\.jsonl\.{ending}: not a whole compressed file"):
            len(read_rows(path).rows)
