"""Reading templates: defaults, and one clear line for every fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtl_lora_cli.errors import ProblemsError
from mtl_lora_cli.tasks.rendering import Renderer
from mtl_lora_cli.tasks.template import Template, index_of, read_template

SENTIMENT = """\
description: Sentiment of a review.
prompt: "Review: {{ text }}\\nSentiment:"
label: label
choices: {0: negative, 1: positive}
"""


def read(folder: Path, text: str) -> Template:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return read_template(path)


def fault(folder: Path, text: str) -> str:
    """The only line of the error, without the folder."""
    with pytest.raises(ProblemsError) as caught:
        read(folder, text)
    (line,) = caught.value.lines
    return line.removeprefix(f"{folder}/")


def test_a_task_of_ones_own_takes_four_lines(tmp_path: Path) -> None:
    template = read(tmp_path, SENTIMENT)
    assert template.version == 1
    assert template.answer == "{{ choice }}"
    assert template.metrics == ["accuracy"]
    assert template.labels == [0, 1]
    assert template.positive_index == 1


def test_a_free_answer_is_measured_by_exact_match(tmp_path: Path) -> None:
    template = read(tmp_path, "description: d\nprompt: '{{ q }}'\nanswer: '{{ a }}'\n")
    assert template.metrics == ["exact_match"]
    assert template.labels is None


def test_labels_of_a_list_are_its_indices_and_of_each_unknown(tmp_path: Path) -> None:
    by_index = SENTIMENT.replace("{0: negative, 1: positive}", "['{{ a }}', '{{ b }}']")
    by_row = SENTIMENT.replace("{0: negative, 1: positive}", "{each: options}")
    assert read(tmp_path, by_index).labels == [0, 1]
    assert read(tmp_path, by_row).labels is None


def test_expectation_is_measured_by_correlation(tmp_path: Path) -> None:
    text = SENTIMENT.replace("{0: negative, 1: positive}", "{0.0: a, 0.5: b}")
    template = read(tmp_path, text + "scoring: expectation\n")
    assert template.metrics[:1] == ["pearson"]
    assert template.labels == [0.0, 0.5]


def test_the_positive_class_can_be_named(tmp_path: Path) -> None:
    template = read(tmp_path, SENTIMENT + "metrics: [f1]\npositive: 0\n")
    assert template.positive_index == 0


def test_it_survives_json_whose_keys_are_texts(tmp_path: Path) -> None:
    """A run folder keeps templates as JSON and evaluates from them."""
    template = read(tmp_path, SENTIMENT + "metrics: [f1]\npositive: 0\n")
    again = Template.model_validate(json.loads(json.dumps(template.model_dump(mode="json"))))
    assert again.labels == ["0", "1"]
    assert again.positive_index == 0
    row = {"text": "Fine.", "label": 1}
    assert Renderer(again, "t").render(row, "f:1") == Renderer(template, "t").render(row, "f:1")


@pytest.mark.parametrize(
    ("choices", "index", "title"),
    [
        ("{1: 'yes', 0: 'no'}", 0, "f1 (yes)"),
        ("{0: 'no', 1: 'yes'}", 1, "f1 (yes)"),
        ("{true: a, false: b}", 0, "f1 (a)"),
        ("{'True': a, 'False': b}", 0, "f1 (a)"),
        ("{'yes': a, 'no': b}", 0, "f1 (a)"),
        ("{'No': a, 'Yes': b}", 1, "f1 (b)"),
        ("{1.0: a, -1.0: b}", 0, "f1 (a)"),
        ("[a, b]", 1, "f1 (b)"),
        ("{spam: a, ham: b}", 1, "f1 (b)"),
        ("{spam: '{{ word }}', ham: '{{ text }}'}", 1, "f1 (ham)"),
    ],
)
def test_the_positive_class_is_1_true_or_yes_and_shown(
    tmp_path: Path, choices: str, index: int, title: str
) -> None:
    text = f"description: x\nprompt: '{{{{ text }}}}'\nlabel: label\nchoices: {choices}\n"
    template = read(tmp_path, text + "metrics: [f1, accuracy]\n")
    assert template.positive_index == index
    assert (template.title("f1"), template.title("accuracy")) == (title, "accuracy")


@pytest.mark.parametrize(
    ("label", "labels", "index"),
    [
        ("0", [0, 1], 0),
        (1.0, [0, 1], 1),
        (True, [0, 1], 1),
        ("true", [False, True], 1),
        ("True", ["false", "true"], 1),
        (2, ["1", "2"], 1),
        ("a", ["A", "a"], 1),  # equality wins over spelling
        (2, [0, 1], None),
        (-1, [0, 1], None),
        (None, [0, 1], None),
    ],
)
def test_labels_match_by_value_then_by_spelling(
    label: object, labels: list[object], index: int | None
) -> None:
    assert index_of(label, labels) == index


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "{{ text }}",
            "{{ text }",
            "mine.yaml:2: prompt: not valid Jinja: unexpected '}' (line 1 of the text)",
        ),
        (
            "label: label",
            "label: label +",
            "mine.yaml:3: label: not valid Jinja: unexpected 'end of template'",
        ),
        (
            "{{ text }}",
            "{{ text | shout }}",
            "mine.yaml:2: prompt: not valid Jinja: No filter named 'shout'. (line 1 of the text)",
        ),
        (
            "{{ text }}",
            "{{ ''.__class__ }}",
            "mine.yaml:2: prompt: access to attribute '__class__' of 'str' object is unsafe.",
        ),
        (
            "0: negative",
            "0: '{{ '",
            "mine.yaml:4: choices.0: not valid Jinja: unexpected 'end of template'",
        ),
        (
            "label: label\n",
            "",
            "mine.yaml:1: label: is required with choices: the expression that picks one of them",
        ),
        ("prompt:", "promt:", None),
        (
            "choices: {0: negative, 1: positive}",
            "",
            None,
        ),
        (
            "{0: negative, 1: positive}",
            "{0: negative}",
            "mine.yaml:4: choices: at least two choices are needed, received 1",
        ),
        (
            "1: positive",
            "1: negative",
            "mine.yaml:4: choices: two choices have the same text 'negative'",
        ),
        (
            "{0: negative, 1: positive}",
            "both",
            "mine.yaml:4: choices: expected label: text pairs, a list of texts, or each and "
            "labels, received 'both'",
        ),
        (
            "{0: negative, 1: positive}",
            "{0: a, 1: b, 2: c}\nmetrics: [accuracy, f1]",
            "mine.yaml:5: metrics: 'f1' does not fit; possible here: accuracy, macro_f1, "
            "matthews, quadratic_kappa",
        ),
        (
            "positive}",
            "positive}\nmetrics: [pearson]",
            "mine.yaml:5: metrics: 'pearson' does not fit; possible here: accuracy, macro_f1, "
            "matthews, quadratic_kappa, f1, roc_auc",
        ),
        (
            "{0: negative, 1: positive}",
            "{no: a, yes: b}\nscoring: expectation",
            "mine.yaml:5: scoring: expectation needs numbers as labels, received 'no'",
        ),
        (
            "positive}",
            "positive}\npositive: 2",
            "mine.yaml:5: positive: expected one of [0, 1], received 2",
        ),
        (
            "positive}",
            "positive}\nfields: {row: label}",
            "mine.yaml:5: fields: 'row' has a meaning of its own; choose another name",
        ),
        (
            "positive}",
            "positive}\nsource: {hub: a/b, path: c}",
            "mine.yaml:5: source: expected exactly one of sample, path and hub, received path, hub",
        ),
    ],
)
def test_faults(tmp_path: Path, old: str, new: str, expected: str | None) -> None:
    text = SENTIMENT.replace(old, new, 1)
    assert text != SENTIMENT
    if expected is None:
        with pytest.raises(ProblemsError) as caught:
            read(tmp_path, text)
        assert len(caught.value.lines) == 2  # both faults are told at once
        return
    assert fault(tmp_path, text) == expected


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ProblemsError) as caught:
        read_template(tmp_path / "none.yaml")
    assert caught.value.lines == [f"{tmp_path}/none.yaml: no such template file"]
