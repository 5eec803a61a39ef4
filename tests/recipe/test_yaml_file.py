"""Scalars as YAML 1.2 reads them, keys that stand once, and the line of every key."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.errors import ProblemsError
from mtl_lora_cli.recipe.yaml_file import (
    Document,
    StrictModel,
    parse_document,
    parse_scalar,
    read_document,
    validate_document,
)


class Leaf(StrictModel):
    size: int = 1
    share: float = 0.5


class Root(StrictModel):
    leaf: Leaf = Leaf()
    leaves: list[Leaf] = []
    named: dict[str, Leaf] = {}
    either: Leaf | None = None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("3E4", 3e4),
        ("1.", 1.0),
        (".5", 0.5),
        ("-2.5e+3", -2500.0),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("12", 12),
        ("-12", -12),
        ("+3", 3),
        ("08", 8),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("tRUE", "tRUE"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        ("e5", "e5"),
        ("1e", "1e"),
        (".", "."),
        ("1.2.3", "1.2.3"),
        ("0b11", "0b11"),
        ("<<", "<<"),
        ("'3'", "3"),
        ('"true"', "true"),
        ("[q_proj, 3, 1e1]", ["q_proj", 3, 10.0]),
        ("{a: no, b: 1}", {"a": "no", "b": 1}),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    received = parse_scalar(text)
    assert (type(received), received) == (type(value), value)


def test_nan() -> None:
    assert math.isnan(parse_scalar(".nan"))


def test_the_value_on_the_command_line_is_the_value_in_the_file() -> None:
    for text in ("3e-4", "yes", "1_000", "[1, a]", "{b: ~}", ".5", "'7'"):
        assert parse_document(f"key: {text}", "file").data == {"key": parse_scalar(text)}


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", 4, "b"),
        ("a:\n  - b: 1\n    b: 2\n", 3, "b"),
        ("a: {b: 1, b: 2}\n", 1, "b"),
        ("1: x\n'1': y\n", 2, "1"),
    ],
)
def test_a_key_stands_once(text: str, line: int, key: str) -> None:
    with pytest.raises(ProblemsError) as caught:
        parse_document(text, "file")
    assert caught.value.lines == [f"file:{line}: the key '{key}' stands twice"]


def test_lines_of_nested_lists_and_maps() -> None:
    document = parse_document(
        "# a comment\n"  # 1
        "top:\n"  # 2
        "  list:\n"  # 3
        "    - one: 1\n"  # 4
        "      two: 2\n"  # 5
        "    -\n"  # 6
        "      one: 3\n"  # 7
        "    - [x,\n"  # 8
        "       y]\n"  # 9
        "  flow: {a: 1,\n"  # 10
        "         b: 2}\n"  # 11
        "  text: |\n"  # 12
        "    several\n"  # 13
        "    lines\n"  # 14
        "last: 1\n",  # 15
        "file",
    )
    expected = {
        ("top",): 2,
        ("top", "list"): 3,
        ("top", "list", 0): 4,
        ("top", "list", 0, "one"): 4,
        ("top", "list", 0, "two"): 5,
        ("top", "list", 1, "one"): 7,
        ("top", "list", 2): 8,
        ("top", "list", 2, 1): 9,
        ("top", "flow"): 10,
        ("top", "flow", "a"): 10,
        ("top", "flow", "b"): 11,
        ("top", "text"): 12,
        ("last",): 15,
    }
    assert {path: document.where(path)[1] for path in expected} == expected
    assert document.where(("top", "list", 0, "unheard of")) == ("file", 4)
    assert document.where(("top", "no such key")) == ("file", 2)


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        ("a: [1\n", "file:2: not valid YAML: "),
        ("a: 'open\n", "file:2: not valid YAML: "),
        ("\ta: 1\n", "file:1: not valid YAML: "),
        ("a: 1\n---\nb: 2\n", "file:2: not valid YAML: "),
        ("a: *unknown\n", "file:1: not valid YAML: "),
        ("a: !!python/name:os.system x\n", "file:1: not valid YAML: "),
        ("a: \x00\n", "file: not valid YAML: "),
        ("[a]: 1\n", "file:1: a key must be a word"),
        ("? {a: 1}\n: 2\n", "file:1: a key must be a word"),
        ("a: " + "[" * 600, "file: not valid YAML: "),
        ("a: " + "9" * 5000, "file: not valid YAML: "),
        ("a: &a [*a]\n", "file: not valid YAML: "),
    ],
)
def test_what_does_not_parse(text: str, beginning: str) -> None:
    with pytest.raises(ProblemsError) as caught:
        parse_document(text, "file")
    (line,) = caught.value.lines
    assert line.startswith(beginning), line


@pytest.mark.parametrize(
    "value",
    ["!!int abc", "!!float abc", "!!bool maybe", "!!timestamp abc", "!!timestamp 2020-13-45"],
)
def test_a_tag_that_its_value_does_not_fit(value: str) -> None:
    with pytest.raises(ProblemsError):
        parse_document(f"a: {value}\n", "file")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("name: é\n".encode("latin-1"))
    for name, message in (
        ("missing", "no such recipe file"),
        ("", "is a folder, expected a recipe file"),
        ("latin", "not UTF-8 text (byte 6)"),
    ):
        path = tmp_path / name
        with pytest.raises(ProblemsError) as caught:
            read_document(path)
        assert caught.value.lines == [f"{path}: {message}"]


def _problems(text: str) -> list[str]:
    with pytest.raises(ProblemsError) as caught:
        validate_document(parse_document(text, "file"), Root)
    return caught.value.lines


def test_all_faults_are_shown_at_once_with_their_lines() -> None:
    text = (
        "leaf:\n"
        "  size: big\n"
        "leaves:\n"
        "  - size: 1\n"
        "  - shere: 1\n"
        "    size: 1.5\n"
        "named:\n"
        "  x: {share: yes}\n"
        "either: {sise: 3}\n"
        "leavs: 1\n"
    )
    assert sorted(_problems(text)) == [
        "file:10: leavs: unknown key; did you mean 'leaves'?",
        "file:2: leaf.size: input should be a valid integer, received 'big'",
        "file:5: leaves.1.shere: unknown key; did you mean 'share'?",
        "file:6: leaves.1.size: input should be a valid integer, received 1.5",
        "file:8: named.x.share: input should be a valid number, received 'yes'",
        "file:9: either.sise: unknown key; did you mean 'size'?",
    ]


def test_an_unknown_key_near_nothing_lists_the_known_ones() -> None:
    assert _problems("leaf:\n  zzz: 1\n") == [
        "file:2: leaf.zzz: unknown key; known keys: share, size"
    ]


def test_types_are_strict() -> None:
    for text in ("'1'", "true", "1.0", "null", "[1]"):
        (problem,) = _problems(f"leaf:\n  size: {text}\n")
        assert problem.startswith("file:2: leaf.size: input should be a valid integer, received ")
    assert validate_document(parse_document("leaf: {share: 1}", "file"), Root).leaf.share == 1.0


@pytest.mark.parametrize("text", ["", "word", "- a", "3", "# only a comment\n"])
def test_a_document_that_is_no_mapping(text: str) -> None:
    (problem,) = _problems(text)
    assert problem.startswith("file: expected keys and values, received ")


@pytest.mark.parametrize("key", ["~", "5", "true", "2.5"])
def test_a_key_that_is_no_word(key: str) -> None:
    (problem,) = _problems(f"leaf: {{}}\n{key}: 1\n")
    assert "keys should be strings" in problem


def test_a_long_value_is_cut_short() -> None:
    (problem,) = _problems(f"leaf: {{size: {'x' * 500}}}\n")
    assert len(problem) < 130


def test_where_falls_back_to_the_document() -> None:
    assert Document("file", {}).where(("a",)) == ("file", None)
