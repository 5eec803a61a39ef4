"""Rendering rows: what comes out, and one exact line for every row that cannot be rendered."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.tasks.rendering import Example, Renderer
from mtl_lora_cli.tasks.template import Template, index_of


def renderer(**keys: Any) -> Renderer:
    keys = {
        "prompt": "Review: {{ text }}\nSentiment:",
        "label": "label",
        "choices": {0: "negative", 1: "positive"},
    } | keys
    known = {key: value for key, value in keys.items() if value is not None}
    return Renderer(Template.model_validate({"description": "d"} | known), "mine")


def fault(rows: Renderer, row: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        rows.render(row, "train.jsonl:12")
    assert "\n" not in str(caught.value)
    (line,) = caught.value.lines
    return line


ROW = {"text": "Fine.", "label": 1}


def test_fixed_choices() -> None:
    assert renderer().render(ROW, "f:1") == Example(
        prompt="Review: Fine.\nSentiment:",
        answer="positive",
        choices=("negative", "positive"),
        gold=1,
    )


def test_choices_by_index_are_texts_of_the_row() -> None:
    rows = renderer(choices=["{{ a }}", "{{ b }} "], label="label - 1")
    example = rows.render({"text": "?", "a": "one", "b": "two", "label": 2}, "f:1")
    assert (example.choices, example.gold, example.answer) == (("one", "two"), 1, "two")


def test_choices_that_a_row_brings_along() -> None:
    rows = renderer(choices={"each": "options.text", "labels": "options.key"}, label="key")
    row = {"text": "?", "options": {"text": ["x", "y", "z"], "key": ["A", "B", "C"]}, "key": "C"}
    assert rows.render(row, "f:1").gold == 2


def test_texts_that_a_row_brings_along_are_never_run_as_templates() -> None:
    rows = renderer(choices={"each": "options"}, label="options[0]")
    example = rows.render({"text": "{{ 7 * 7 }}", "options": ["{{ 1 }}", "{% if %}"]}, "f:1")
    assert example.prompt == "Review: {{ 7 * 7 }}\nSentiment:"
    assert example.choices == ("{{ 1 }}", "{% if %}")


def test_the_answer_wraps_every_choice_and_may_read_the_row() -> None:
    alone = renderer(answer="It is {{ choice }}.").render(ROW, "f:1")
    assert alone.choices == ("It is negative.", "It is positive.")
    assert alone.answer == "It is positive."
    with_row = renderer(answer="{{ text }} is {{ choice }}").render(ROW, "f:1")
    assert with_row.answer == "Fine. is positive"


def test_a_free_answer() -> None:
    rows = renderer(choices=None, label=None, answer=" {{ summary }}\n")
    example = rows.render({"text": "Long.", "summary": "Short."}, "f:1")
    assert example == Example("Review: Long.\nSentiment:", "Short.", (), -1)


@pytest.mark.parametrize(("label", "gold"), [(0.2, 0), (0.25, 0), ("0.3", 1), (1, 2), (0.99, 2)])
def test_expectation_keeps_the_number_and_learns_the_nearest_choice(
    label: object, gold: int
) -> None:
    rows = renderer(choices={0.0: "0.0", 0.5: "0.5", 1.0: "1.0"}, scoring="expectation")
    example = rows.render({"text": "?", "label": label}, "f:1")
    assert (example.gold, example.value) == (gold, float(str(label)))


def test_rows_to_predict_need_no_label() -> None:
    example = renderer().render({"text": "Fine."}, "f:1", labelled=False)
    assert (example.answer, example.gold) == ("", -1)
    assert example.choices == ("negative", "positive")
    free = renderer(choices=None, label=None, answer="{{ summary }}")
    assert free.render({"text": "Long."}, "f:1", labelled=False).answer == ""


def test_fields_build_on_one_another_and_hide_the_row() -> None:
    rows = renderer(
        fields={"text": "row['Review Text']", "loud": "text | upper"},
        prompt="{{ loud }} {{ text }}",
    )
    example = rows.render({"Review Text": "fine", "text": "hidden", "label": 0}, "f:1")
    assert example.prompt == "FINE fine"


def test_a_prompt_has_no_white_space_at_its_end() -> None:
    """The one space between prompt and answer is set where they are joined."""
    assert renderer(prompt="{{ text }}\nAnswer: \n").render(ROW, "f:1").prompt == "Fine.\nAnswer:"


@pytest.mark.parametrize(
    ("keys", "row", "expected"),
    [
        (
            {},
            {"tekst": "a", "label": 1},
            "prompt: the row has no field 'text'; it has: tekst, label; did you mean 'tekst'?",
        ),
        (
            {"label": "grade"},
            ROW,
            "label: the row has no field 'grade'; it has: text, label",
        ),
        ({}, {}, "prompt: the row has no field 'text'; it has: no fields"),
        (
            {"prompt": "{{ row['a b'] }}"},
            ROW,
            "prompt: 'dict object' has no attribute 'a b'",
        ),
        (
            {"fields": {"first": "text.split()[3]"}},
            ROW,
            "fields.first: list object has no element 3",
        ),
        ({}, {"text": "a", "label": 2}, "label: received 2, expected one of 0, 1"),
        ({}, {"text": "a", "label": None}, "label: is null, expected one of 0, 1"),
        (
            {"choices": {"each": "['x', 'y']"}},
            {"text": "a", "label": "z"},
            "label: received 'z', expected one of 'x', 'y'",
        ),
        (
            {"prompt": "{{ text }} "},
            {"text": " ", "label": 1},
            "prompt: is empty for this row",
        ),
        (
            {},
            {"text": None, "label": 1},
            "prompt: a null would be printed; null in this row: text; where a null is right, say "
            "what to print instead, as in {{ brand or 'unknown' }}",
        ),
        (
            {"choices": None, "label": None, "answer": "{{ a }}"},
            {"text": "x", "a": ""},
            "answer: is empty for this row",
        ),
        (
            {"choices": ["{{ a }}", "{{ b }}"]},
            {"text": "x", "a": "same", "b": "same ", "label": 0},
            "choices: 'same' stands twice",
        ),
        (
            {"choices": ["{{ a }}", "{{ b }}"], "answer": "It is {{ choice }}"},
            {"text": "x", "a": "one", "b": "", "label": 0},
            "choices: one of 'one', '' is empty",
        ),
        (
            {"choices": {"each": "text.split('/')"}},
            {"text": "only", "label": "only"},
            "choices: at least two are needed, received 'only'",
        ),
        (
            {"choices": {"each": "text"}},
            ROW,
            "choices: expected a list, received 'Fine.'",
        ),
        (
            {"choices": {"each": "[text, label]", "labels": "[1, 2, 3]"}},
            ROW,
            "choices: 2 texts but 3 labels",
        ),
        (
            {"choices": {0: "a", 5: "b"}, "scoring": "expectation"},
            {"text": "a", "label": -1},
            "label: received -1, expected a number from 0.0 to 5.0",
        ),
        (
            {"choices": {0: "a", 5: "b"}, "scoring": "expectation"},
            {"text": "a", "label": float("nan")},
            "label: received nan, expected a number from 0.0 to 5.0",
        ),
        (
            {"prompt": "{{ text.__class__.__mro__ }}"},
            ROW,
            "prompt: access to attribute '__class__' of 'str' object is unsafe.",
        ),
        (
            {"label": "row.update({'label': 0})"},
            ROW,
            "label: <built-in method update of dict object> is not safely callable",
        ),
    ],
)
def test_faults(keys: dict[str, Any], row: dict[str, Any], expected: str) -> None:
    line = fault(renderer(**keys), row)
    assert line.startswith("train.jsonl:12: task 'mine': ")
    line = line.removeprefix("train.jsonl:12: task 'mine': ")
    if "built-in method" in expected:
        assert "update" in line  # Python writes an address into it
    else:
        assert line == expected


@pytest.mark.parametrize("name", ["trim", "lower", "upper", "capitalize", "title"])
def test_no_filter_prints_a_null(name: str) -> None:
    assert "a null would be printed" in fault(
        renderer(prompt=f"{{{{ text | {name} }}}}"), {"text": None, "label": 1}
    )


DECOMPOSED = unicodedata.normalize("NFD", "größe")


@pytest.mark.parametrize(
    ("label", "labels", "gold"),
    [
        # As pandas writes whole numbers beside an empty cell, and as others write truth values.
        *(("1.0", [0, 1], 1), ("0.0", [0, 1], 0), (1.0, ["0", "1"], 1), ("1", ["0.0", "1.0"], 1)),
        *(("True", [0, 1], 1), ("false", [0, 1], 0), ("1.0", [True, False], 0), (True, [0, 1], 1)),
        *(("01", [0, 1], 1), (" 1 ", [0, 1], 1), ("+1", [0, 1], 1), ("2.50", [2.5, 3], 0)),
        # The same letters in another Unicode form, and spaces of other kinds.
        *((DECOMPOSED, ["klein", "größe"], 1), ("größe", ["klein", DECOMPOSED], 1)),
        *(("not\u00a0sure", ["sure", "not sure"], 1), ("yes ", ["yes", "no"], 0), ("NO\t", ["yes", "no"], 1)),
        # What is equal comes first.
        *(("1.0", ["1", "1.0"], 1), ("A", ["a", "A"], 1), ("a b", ["a  b", "a b"], 1)),
        # What is no label is none.
        *(("1_0", [1, 10], None), ("1,0", [1, 10], None), ("x²", ["x2", "y"], None), ("", [0, 1], None)),
        *(("10000000000000000001", [10000000000000000000, 1], None), ([1], [0, 1], None)),
        *((float("nan"), [0, 1], None), ("ﬁne", ["fine", "no"], 0), ("1.5", [1, 2], None)),
    ],
)  # fmt: skip
def test_the_same_label_in_many_forms(label: Any, labels: list[Any], gold: int | None) -> None:
    assert index_of(label, labels) == gold
    rows = renderer(choices={value: f"choice {n}" for n, value in enumerate(labels)})
    row = {"text": "?", "label": label}
    if gold is None:
        assert "label: received " in fault(rows, row)
    else:
        for _ in range(2):  # the second time it is known
            assert rows.render(row, "f:1").gold == gold


def test_a_label_that_only_looks_like_another_one_is_spelt_out() -> None:
    rows = renderer(choices={"yes": "y", "no": "n"})
    assert fault(rows, {"text": "?", "label": "y\u0435s"}).endswith(
        "label: received 'y\u0435s' (written 'y\\u0435s'), expected one of 'yes', 'no'"
    )
    assert "received 'yes\\u200b', " in fault(rows, {"text": "?", "label": "yes\u200b"})


def test_templates_cannot_be_random() -> None:
    with pytest.raises(ValueError, match="No filter named 'random'"):
        renderer(prompt="{{ [1, 2] | random }}")
    assert "no field 'lipsum'" in fault(renderer(prompt="{{ lipsum() }}"), ROW)


NUMBERS = ["4", "2", "1", "3"]


@pytest.mark.parametrize(
    ("label", "gold"),
    [(2, None), ("2", None), (1, None), (3, 3), (4, 0), ("4", 0), ("3", 3)],
)
def test_a_number_beside_options_that_are_numbers_fits_one_way_or_none(
    label: Any, gold: int | None
) -> None:
    """3 is the index of '3' itself, and 4 no index at all; said which, every one of them fits."""
    row = {"text": "?", "options": NUMBERS, "label": label}
    unsaid = renderer(choices={"each": "options"})
    if gold is None:
        assert "label: " in fault(unsaid, row) and "fits in two ways" in fault(unsaid, row)
    else:
        assert unsaid.render(row, "f:1").gold == gold
    by_text = renderer(choices={"each": "options", "labels": "options"}, label="label | int")
    assert by_text.render(row, "f:1").gold == NUMBERS.index(str(int(float(label))))
    by_place = renderer(choices={"each": "options", "labels": "range(4)"}, label="label | int")
    if int(float(label)) < 4:
        assert by_place.render(row, "f:1").gold == int(float(label))


def test_a_place_in_a_list_of_numbers_is_no_number_of_an_expectation() -> None:
    rows = renderer(choices=["1", "2", "3"], scoring="expectation")
    assert "fits in two ways" in fault(rows, {"text": "?", "label": 1})
    said = renderer(choices={1: "1", 2: "2", 3: "3"}, scoring="expectation")
    assert said.render({"text": "?", "label": 1}, "f:1").gold == 0
