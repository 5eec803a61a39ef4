"""Data files of any content: rows, or one line that names the file; never anything else."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mtl_lora_cli.data.delimited import BY_ENDING, Layout
from mtl_lora_cli.data.file_formats import ENDINGS, Rows, read_file
from mtl_lora_cli.data.streams import stream_parts
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.tasks.rendering import Renderer
from mtl_lora_cli.tasks.template import Template

Fuzz = settings.get_profile("fuzz")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=6,
)  # fmt: skip
ROWS = st.lists(st.dictionaries(st.text(max_size=8), VALUES, min_size=1, max_size=4), min_size=1, max_size=6)  # fmt: skip
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252")
TEMPLATE = Template(description="x", prompt="{{ text }}?", label="label", choices={0: "no", 1: "yes"})  # fmt: skip


def read(data: bytes, ending: str, layout: Layout = BY_ENDING) -> Rows | str:
    """The rows of a file, or the one line that says why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{ending}"
        path.write_bytes(data)
        try:
            return read_file(path, layout)
        except UsageError as error:
            (line,) = error.lines
            assert f"rows{ending}" in line
            assert "\n" not in line
            return line


def whole(found: Rows | str) -> None:
    """Rows are dictionaries that a template can be given, each with its place."""
    if isinstance(found, str):
        return
    assert found.rows
    assert len(found.rows) == len(found.places)
    renderer = Renderer(TEMPLATE, "task")
    for row, place in zip(found.rows, found.places, strict=True):
        assert isinstance(row, dict)
        try:
            renderer.render(row, place)
        except UsageError as error:
            assert str(error).startswith(place)


@settings(Fuzz)
@given(st.binary(max_size=300), st.sampled_from(ENDINGS))
def test_any_bytes(data: bytes, ending: str) -> None:
    whole(read(data, ending))


@settings(Fuzz)
@given(ROWS, st.sampled_from(ENCODINGS), st.sampled_from(ENDINGS[:8]), st.data())
def test_rows_in_any_encoding_with_other_bytes(
    rows: list[dict[str, Any]], encoding: str, ending: str, data: st.DataObject
) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=data.draw(st.booleans())) for row in rows)
    text = (
        f"[{','.join(lines.splitlines())}]"
        if ending.startswith(".json") and "l" not in ending
        else lines
    )
    plain = bytearray(
        text.encode(encoding, errors="surrogatepass" if "utf" in encoding else "replace")
    )
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(plain)))
        plain[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    content = gzip.compress(bytes(plain)) if ending.endswith(".gz") else bytes(plain)
    whole(read(content, ending))


@settings(Fuzz)
@given(ROWS)
def test_what_was_written_is_what_is_read(rows: list[dict[str, Any]]) -> None:
    for ending, text in (
        (".jsonl", "\n".join(json.dumps(row) for row in rows)),
        (".json", json.dumps(rows)),
        (".json", json.dumps({"data": rows}, indent=1)),
    ):
        found = read(text.encode(), ending)
        if isinstance(found, str):  # half a character is no text that could be tokenised
            assert "surrogates not allowed" in found
            assert "\\ud" in text
        else:
            assert list(found.rows) == rows


@settings(Fuzz)
@given(ROWS, st.data())
def test_a_stream_gives_what_the_file_gives(
    rows: list[dict[str, Any]], data: st.DataObject
) -> None:
    text = bytearray("\n".join(json.dumps(row) for row in rows).encode())
    place = data.draw(st.integers(0, len(text)))
    text[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    found = read(bytes(text), ".jsonl")
    given_rows: list[Any] = []
    try:
        for part in stream_parts(
            io.BytesIO(bytes(text)), "rows.jsonl", data.draw(st.integers(1, 4))
        ):
            given_rows += [row for row, _ in part]
    except UsageError:
        assert isinstance(found, str)
        return
    assert isinstance(found, str) or given_rows == list(found.rows)
    assert not isinstance(found, str) or not given_rows  # only an empty file ends one of them


# Texts of few characters, so that marks, delimiters and line ends meet each other often.
FIELDS = st.text('"",;\t|\n\r\'ab é\u2028', max_size=6)
PLAIN = st.text('"",;|\'ab é\u2028', max_size=6)  # without a tab or a line end


@st.composite
def tables(draw: st.DrawFn, fields: st.SearchStrategy[str]) -> list[list[str]]:
    """A header with names that differ, and rows of the same length, none of them an empty line."""
    width = draw(st.integers(2, 4))
    header = draw(
        st.lists(
            st.text("xyz", min_size=1, max_size=3), min_size=width, max_size=width, unique=True
        )
    )
    rows = st.lists(st.lists(fields, min_size=width, max_size=width), min_size=1, max_size=6)
    return [header, *draw(rows)]  # fmt: skip


def as_rows(table: list[list[str]]) -> list[dict[str, str]]:
    return [dict(zip(table[0], row, strict=True)) for row in table[1:]]


def starts(plain: str, found: Rows, first: str) -> None:
    """Where a row is said to stand, its first field begins."""
    ends = ("\r\n", "\r", "\n")
    lines = [line.rstrip("\r\n") for line in io.StringIO(plain, newline="")]
    for row, place in zip(found.rows, found.places, strict=True):
        line = lines[int(place.rpartition(":")[2]) - 1].lstrip('"')
        field = row[first].replace('"', '""').lstrip('"')
        for end in ends:
            field = field.partition(end)[0]
        assert line.startswith(field)


@settings(Fuzz)
@given(
    tables(FIELDS),
    st.sampled_from(",;\t|"),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([".csv", ".tsv", ".csv.gz", ".txt"]),
    st.booleans(),
)
def test_what_the_csv_module_quotes_is_what_is_read(
    table: list[list[str]], delimiter: str, quoting: Any, end: str, ending: str, mark: bool
) -> None:
    if end == "\n":  # the module leaves a carriage return without marks here
        table = [[value.replace("\r", "") for value in row] for row in table]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows(table)
    data = text.getvalue().encode("utf-8-sig" if mark else "utf-8")
    content = gzip.compress(data) if ending.endswith(".gz") else data
    found = read(content, ending, Layout(delimiter=delimiter, quoting="csv"))
    assert not isinstance(found, str), found
    assert list(found.rows) == as_rows(table)
    starts(text.getvalue(), found, table[0][0])
    bare = read(
        content, ending, Layout(delimiter=delimiter, quoting="csv", columns=["p", "q", "r", "s"])
    )
    assert isinstance(bare, str) == (len(table[0]) != 4)
    if not isinstance(bare, str):
        assert [list(row.values()) for row in bare.rows] == table


@settings(Fuzz)
@given(tables(PLAIN), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_quotation_marks_of_a_tsv_are_text(table: list[list[str]], end: str, last: bool) -> None:
    """And where a CSV writer would have written the same marks, there is a note."""
    text = end.join("\t".join(row) for row in table) + end * last
    found, said = (read(text.encode(), ".tsv", Layout(quoting=how)) for how in (None, "none"))
    assert not isinstance(found, str) and not isinstance(said, str)
    assert list(found.rows) == list(said.rows) == as_rows(table)
    assert [place.rpartition(":")[2] for place in found.places] == [
        str(number) for number in range(2, len(table) + 1)
    ]
    doubled = [
        value
        for row in table
        for value in row
        if len(value) > 2
        and value[0] == value[-1] == '"'
        and '""' in value[1:-1]
        and '"' not in value[1:-1].replace('""', "")
    ]
    assert bool(found.notes) == bool(doubled)
    assert said.notes == ()


@pytest.fixture(scope="module")
def columns() -> bytes:
    table = pyarrow.table({"text": ["a", "b", None], "label": [0, 1, 1], "more": [[1], [], [2, 3]]})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()


@settings(Fuzz)
@given(place=st.integers(0, 10**4), bit=st.integers(0, 7), cut=st.booleans())
def test_parquet_with_other_bits(columns: bytes, place: int, bit: int, cut: bool) -> None:
    data = bytearray(columns)
    place %= len(data)
    data[place] ^= 1 << bit
    whole(read(bytes(data[:place] if cut else data), ".parquet"))


@pytest.mark.parametrize(
    ("data", "ending", "message"),
    [
        (b'{"text": "' + b"x" * 10_000_000 + b'", "label": 1}\n', ".jsonl", None),
        (b"text,label\n" + b"y" * 10_000_000 + b",0\n", ".csv", None),
        (b'{"text": "' + b"x" * 10_000_000, ".jsonl", "not valid JSON"),
        (b'{"a": "\x00"}\n', ".jsonl", "has a null byte"),
        (b"a\tb\n1\x00\t2\n", ".tsv", "has a null byte"),
        (b'{"a": 1, "b": 2, "a": 3}\n', ".jsonl", "the key 'a' stands twice"),
        (b"a,b,a\n1,2,3\n", ".csv", "the column 'a' stands twice"),
        (b"[" * 100_000, ".json", "not valid JSON"),
        (b'{"a": ' * 100_000, ".jsonl", "not valid JSON"),
        (gzip.compress(b'{"a": 1}\n')[:-4], ".jsonl.gz", "not a whole gzip file"),
        ('{"a": "é"}\n'.encode("latin-1"), ".jsonl", "not UTF-8 text"),
        ('{"a": 1}\n'.encode("utf-16"), ".jsonl", "not UTF-8 text"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", ".jsonl", "not valid JSON"),
    ],
    ids=[
        "a long value",
        "a long field",
        "a long line without an end",
        "a null byte in JSON",
        "a null byte in TSV",
        "a key twice",
        "a column twice",
        "a deep list",
        "a deep object",
        "half a gzip file",
        "latin-1",
        "utf-16",
        "a long number",
    ],
)  # fmt: skip
def test_hostile_files(data: bytes, ending: str, message: str | None) -> None:
    found = read(data, ending)
    if message is None:
        assert not isinstance(found, str)
        assert len(found.rows) == 1
    else:
        assert isinstance(found, str)
        assert message in found
