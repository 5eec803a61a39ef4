"""JSON lines as they come: parts, and what happens at a line that is none."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.data.delimited import BY_ENDING
from mtl_lora_cli.data.sources import layout_of_new_rows
from mtl_lora_cli.data.streams import read_parts, stream_parts, with_names
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.source import Source

LINES = b'{"a": 1}\n\n{"a": 2}\r\n{"a": "\xc3\xa9"}'  # the last one has no end


def rows(parts: Iterator[list[Any]]) -> list[Any]:
    return [one for part in parts for one in part]


def test_rows_and_their_places() -> None:
    found = rows(stream_parts(io.BytesIO(LINES), "stdin", 2))
    assert found == [({"a": 1}, "stdin:1"), ({"a": 2}, "stdin:3"), ({"a": "é"}, "stdin:4")]


def test_no_part_is_larger_than_asked_and_all_come_in_order() -> None:
    data = b"".join(b'{"n": %d}\n' % n for n in range(5000))
    parts = list(stream_parts(io.BytesIO(data), "stdin", 64))
    assert max(map(len, parts)) <= 64
    assert [row["n"] for part in parts for row, _ in part] == list(range(5000))


def test_a_row_is_given_before_the_next_one_is_written() -> None:
    """Whoever writes one row and waits for its answer would wait forever otherwise."""
    out, into = os.pipe()
    with os.fdopen(out, "rb") as file, os.fdopen(into, "wb", buffering=0) as pipe:
        parts = stream_parts(file, "stdin", 64)
        for number in range(3):
            pipe.write(b'{"n": %d}\n' % number)
            assert next(parts) == [({"n": number}, f"stdin:{number + 1}")]
        pipe.close()
        assert list(parts) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"[1]", "stdin:2: expected an object for each row, received [1]"),
        (b"{", "stdin:2: not valid JSON"),
        (b'{"a": "\xff"}', "stdin:2: not UTF-8 text"),
        (b'{"a": 1, "a": 2}', "stdin:2: not valid JSON: the key 'a' stands twice"),
        (b'{"a": NaN}', "stdin:2: not valid JSON"),
        (b'{"a": "\0"}', "stdin:2: not text: has a null byte"),
    ],
)
def test_rows_before_a_bad_line_are_given(bad: bytes, message: str) -> None:
    given = []
    with pytest.raises(UsageError) as caught:
        for part in stream_parts(io.BytesIO(b'{"a": 1}\n' + bad + b'\n{"a": 3}\n'), "stdin", 64):
            given += part
    assert given == [({"a": 1}, "stdin:1")]
    assert message in str(caught.value)


def test_new_rows_are_written_as_the_task_s_own_are(tmp_path: Path) -> None:
    """In its layout, with or without a header, labels, or the other names; in any format."""
    table = tmp_path / "rows.tsv"
    layout, names = layout_of_new_rows(
        Source(path="x", delimiter=";", quoting="none", columns=["label", "text"])
    )
    assert names == {}
    for text, expected in (
        ('1;"a\n', {"label": "1", "text": '"a'}),
        ('index;text\n1;"a\n', {"index": "1", "text": '"a'}),
        ('index;note;text\n1;;"a\n', {"index": "1", "note": "", "text": '"a'}),
    ):
        table.write_text(text, encoding="utf-8")
        assert rows(read_parts(table, 9, layout)) == [(expected, f"{table}:{text.count(chr(10))}")]
    (tmp_path / "rows.json").write_text('[{"text": "a"}]', encoding="utf-8")
    assert rows(read_parts(tmp_path / "rows.json", 9, layout))[0][0] == {"text": "a"}

    layout, names = layout_of_new_rows(
        Source(path="x", columns={"question": "text", "dup": "label"})
    )
    lines = b'{"question": "a", "dup": 1}\n{"text": "b"}\n{"text": "c", "question": "d"}\n'
    parts = with_names(stream_parts(io.BytesIO(lines), "stdin", 1), names)
    assert next(parts) == [({"text": "a", "label": 1}, "stdin:1")]
    assert next(parts) == [({"text": "b"}, "stdin:2")]
    with pytest.raises(UsageError, match="stdin:3: 'question' is called 'text' here, and both"):
        next(parts)
    assert layout_of_new_rows(None) == (BY_ENDING, {})


def test_files_of_any_format(tmp_path: Path) -> None:
    content = [{"a": "1"}, {"a": "2"}, {"a": "3"}]
    lines, table = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    lines.write_text("".join(f"{json.dumps(row)}\n" for row in content), encoding="utf-8")
    table.write_text("a\n1\n2\n3\n", encoding="utf-8")
    for path in (lines, table):
        parts = list(read_parts(path, 2))
        assert [row for part in parts for row, _ in part] == content
        assert max(map(len, parts)) <= 2
    with pytest.raises(UsageError, match="No such file"):
        list(read_parts(tmp_path / "no.jsonl", 2))
