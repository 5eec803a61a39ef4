"""What a template prints: never what Python writes for a value, and a row's own field before a method."""

from __future__ import annotations

import datetime
import math
from decimal import Decimal
from typing import Any

import pytest

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.tasks.jinja import Text
from mtl_lora_cli.tasks.rendering import Renderer
from mtl_lora_cli.tasks.template import Template


def rendered(prompt: str, row: dict[str, Any], **keys: Any) -> str:
    template = Template.model_validate(
        {"description": "d", "prompt": prompt, "answer": "ok"} | keys
    )
    return Renderer(template, "t").render(row, "rows.jsonl:7").prompt


def fault(prompt: str, row: dict[str, Any], **keys: Any) -> str:
    with pytest.raises(UsageError) as caught:
        rendered(prompt, row, **keys)
    (line,) = caught.value.lines
    return line.removeprefix("rows.jsonl:7: task 't': ")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x", "x"),
        (3, "3"),
        (0.5, "0.5"),
        (Decimal("1.50"), "1.50"),
        (True, "True"),
        (datetime.date(2020, 1, 2), "2020-01-02"),
    ],
)
def test_texts_numbers_and_dates_are_printed(value: Any, text: str) -> None:
    assert rendered("{{ a }}", {"a": value}) == text


LIST = "a list (['x', 'y']) would be printed; in this row: a; say how, as in {{ a | join(', ') }}"
NULL = "a null would be printed; null in this row: a; "


@pytest.mark.parametrize(
    ("prompt", "row", "expected"),
    [
        ("{{ a }}", {"a": ["x", "y"]}, LIST),
        ("so {{ a }}", {"a": ["x", "y"]}, LIST),
        ("{{ a | upper }}", {"a": ["x", "y"]}, LIST),
        ("{{ a | replace('x', 'z') }}", {"a": ["x", "y"]}, LIST),
        ("{{ a | string }}", {"a": ["x", "y"]}, LIST),
        ("{{ 'of ' ~ a }}", {"a": ["x", "y"]}, LIST),
        ("{{ 'of %s' % a }}", {"a": ["x", "y"]}, LIST),
        ("{{ 'of {}'.format(a) }}", {"a": ["x", "y"]}, LIST),
        ("{{ 'of %s' | format(a) }}", {"a": ["x", "y"]}, LIST),
        (
            "{{ a.b }}",
            {"a": {"b": {"c": 1}}},
            "a dictionary ({'c': 1}) would be printed; in this row: a.b; name one of its fields, as "
            "in {{ a.b.field }}, or print all: {{ a.b | tojson }}",
        ),
        (
            "{{ a }}",
            {"a": b"\xff\xd8"},
            "bytes (b'\\xff\\xd8') would be printed; in this row: a; say how to read them, as in "
            "{{ a.decode('utf-8') }}",
        ),
        (
            "{{ a }}",
            {"a": math.nan},
            "nan, which is no number, would be printed; in this row: a; say what to print instead, as "
            "in {{ a if a == a else 'unknown' }}",
        ),
        (
            "{{ a.keys }}",
            {"a": {"b": 1}},
            "the method 'keys' would be printed; in this row a has no field of that name",
        ),
        (
            "{{ a.title }}",
            {"a": "x"},
            "the method 'title' would be printed; in this row a has no field of that name",
        ),
        (
            "{{ a | map('upper') }}",
            {"a": ["x"]},
            "a Python generator would be printed; say how, as in {{ x | join(', ') }}",
        ),
        (
            "{{ a | join(', ') }}",
            {"a": "red"},
            "join: expected a list, received a text; letters are joined by | list | join",
        ),
        ("{{ a | int }}", {"a": ""}, "int: expected a number, received ''"),
        # Jinja's own names.
        ("{{ range }}", {"a": 1}, "the row has no field 'range'; it has: a"),
        ("{{ dict }}", {"dikt": 1}, "the row has no field 'dict'; it has: dikt; did you mean 'dikt'?"),
        (
            "{% for x in a %}{{ loop }}{% endfor %}",
            {"a": [1], "loop": "mine"},
            "what Jinja calls 'loop' would be printed; 'loop' is a word of Jinja's here; a field of "
            "that name is row['loop']",
        ),
    ],
)  # fmt: skip
def test_what_python_would_write_is_an_error(
    prompt: str, row: dict[str, Any], expected: str
) -> None:
    assert fault(prompt, row) == f"prompt: {expected}"


@pytest.mark.parametrize(
    "prompt",
    [
        *("{{ a }}", "{{ 'x' ~ a }}", "{{ 'x%s' % a }}", "{{ '%s %s' % (1, a) }}"),
        *("{{ '{}'.format(a) }}", "{{ '{b.a}'.format(b=b) }}", "{{ '{a}'.format_map(b) }}"),
        *(f"{{{{ a | {name} }}}}" for name in ("safe", "e", "indent", "wordwrap(3)", "center(9)")),
        *(f"{{{{ a | {name} }}}}" for name in ("truncate(3)", "string", "striptags", "urlize")),
        *("{{ a | trim }}", "{{ [1, a] | join }}", "{{ [b] | join(attribute='a') }}"),
    ],
)
def test_no_way_prints_a_null(prompt: str) -> None:
    assert fault(prompt, {"a": None, "b": {"a": None}}).startswith(f"prompt: {NULL}")


def test_a_field_comes_before_a_method_of_its_name() -> None:
    """The text is the same in every process; a method has an address in it."""
    basket = {"items": "three pears", "values": 3, "keys": "k", "get": "g", "copy": ["c"]}
    row = {"basket": basket, "items": "top", "get": "mine"}
    prompt = (
        "{{ basket.items }} {{ basket.values }} {{ basket['get'] }} {{ row.items }} {{ items }}"
    )
    assert rendered(prompt, row) == "three pears 3 g top top"
    assert rendered("{{ basket.copy | first }}", row) == "c"


def test_what_is_called_is_the_method() -> None:
    basket = {"items": "three pears", "get": "g"}
    prompt = "{% for name, value in basket.items() %}{{ name }}: {{ value }}; {% endfor %}"
    assert rendered(prompt, {"basket": basket}) == "items: three pears; get: g;"
    assert rendered("{{ basket.get('items') }}", {"basket": basket}) == "three pears"
    assert rendered("{{ row.get('none', 'x') }}", {"get": "mine"}) == "x"


@pytest.mark.parametrize(
    "name", ["range", "dict", "cycler", "joiner", "namespace", "loop", "caller", "choice"]
)
def test_a_column_with_a_name_of_jinja_s_is_the_column(name: str) -> None:
    for prompt in (f"{{{{ {name} }}}}", f"A {{{{ {name} | trim }}}}"):
        assert rendered(prompt, {name: "mine", "other": 1}).endswith("mine")
    label = {"label": name, "choices": {"mine": "yes", "other": "no"}, "answer": "{{ choice }}"}
    assert rendered("{{ other }}", {name: "mine", "other": 1}, **label) == "1"


def test_a_column_that_is_called_row() -> None:
    row = {"row": "mine", "id": 3}
    assert fault("{{ row.id }}", row) == (
        "row: the template reads the whole row under this name, which a field of it has, too; call "
        "that another: columns: {row: …} in the source"
    )
    assert rendered("{{ id }}", row) == "3"


def test_jinja_s_own_self_is_refused_before_any_row() -> None:
    with pytest.raises(ValueError, match=r"'self' is a word of Jinja's here; .* is row\['self'\]"):
        Text("{{ self }}")
    assert rendered("{{ row['self'] }}", {"self": "mine"}) == "mine"


def test_a_label_or_a_list_of_choices_is_no_method() -> None:
    keys = {"label": "a.keys", "choices": {"x": "1", "y": "2"}, "answer": "{{ choice }}"}
    assert "the method 'keys' would be printed" in fault("?", {"a": {}}, **keys)
    keys = {"label": "'x'", "choices": {"each": "a"}, "answer": "{{ choice }}"}
    for value in (None, ["z"], math.nan, b"x"):
        assert "would be printed, one of 'x', " in fault("?", {"a": ["x", value]}, **keys)


def test_json_is_printed_as_it_is() -> None:
    """Jinja's own filter writes the signs of HTML as numbers."""
    assert rendered("{{ a | tojson }}", {"a": {"é": ["<b>", "'"]}}) == '{"é": ["<b>", "\'"]}'


def test_a_number_is_read_where_there_is_one() -> None:
    assert (
        rendered("{{ a | int }} {{ b | int(7) }} {{ c | float }}", {"a": "1.0", "b": "", "c": "2"})
        == "1 7 2.0"
    )


def test_what_a_text_reads_and_prints() -> None:
    text = Text(
        "{{ a | trim }} {{ b.c }} {{ row['x y'] }} {% if d %}{{ d }}{% endif %}"
        "{% for o in opts %}{{ o.text }}{% endfor %}{{ e or 'x' }} {{ f | default('y') }} {{ g.strip() }}"
    )
    assert text.names == {"a", "b", "row", "d", "opts", "e", "f", "g"}
    assert text.printed == (("a",), ("b", "c"), ("row", "x y"))
    assert set(text.paths) >= {("a",), ("b", "c"), ("row", "x y"), ("opts",), ("g",)}
