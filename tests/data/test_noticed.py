"""What rows and templates say that nobody meant: told before the first step, once each, and only then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.data.bind import bind_tasks
from mtl_lora_cli.data.prepare import prepare_training
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_tokenizer
from mtl_lora_cli.recipe.load import load_recipe

TEMPLATE = """description: d
prompt: "{{ text }}"
label: label
choices: {0: "no", 1: "yes"}
"""
FREE = 'description: d\nprompt: "{{ text }}"\nanswer: "{{ label }}"\n'
Findings = Callable[..., list[str]]


@pytest.fixture
def findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stories_folder: Path) -> Findings:
    """`findings(template)` of the files that lie in `d`, without what stands before the first colon."""
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "d").mkdir()

    def find(template: str) -> list[str]:
        (tmp_path / "own.yaml").write_text(template, encoding="utf-8")
        recipe = tmp_path / "recipe.yaml"
        task = "- {name: own, template: own.yaml, source: d}\n"
        recipe.write_text(f"base_model: {stories_folder}\ntasks:\n{task}", encoding="utf-8")
        loaded = load_recipe(recipe, ())
        tokenizer = load_tokenizer(find_base_model(str(stories_folder)))
        data = prepare_training(bind_tasks(loaded), loaded.recipe, tokenizer, 512)
        lines = data.audits[0].findings("own")
        return [line.removeprefix("own: ").replace(f"{tmp_path}/", "") for line in lines]

    return find


def write(tmp_path: Path, split: str, texts: list[Any], labels: list[Any] | None = None) -> None:
    rows = [
        {"text": text, "label": number % 2 if labels is None else labels[number]}
        for number, text in enumerate(texts)
    ]
    content = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "d" / f"{split}.jsonl").write_text(content, encoding="utf-8")


def test_what_pandas_makes_of_a_missing_cell(tmp_path: Path, findings: Findings) -> None:
    """Integers beside an empty cell become fractions, and texts become the word nan."""
    import pandas

    table = pandas.DataFrame(
        {"year": [1990, None, 1992], "who": ["a", None, "c"], "label": [0, 1, 0]}
    )
    printed = table.assign(who=table["who"].map(str)).fillna({"year": 7})
    template = TEMPLATE.replace("{{ text }}", "{{ year }} {{ who }}")
    for ending in ("csv", "parquet"):
        file = tmp_path / "d" / f"train.{ending}"
        getattr(printed, f"to_{ending}")(file, index=False)
        place = "d/train.csv:" if ending == "csv" else "d/train.parquet, row "
        line = 2 if ending == "csv" else 1
        number, word, _ = findings(template)
        assert number == (
            "3 of 3 training rows print a whole number as 3.0 (NAME | int writes 3) "
            f"(year), the first is {place}{line}"
        )
        assert word == (
            "1 of 3 training rows print a word for what is missing, such as nan or None "
            f"(who), the first is {place}{line + 1}"
        )
        assert len(findings(template.replace("year", "year | int"))) == 2
        file.unlink()


@pytest.mark.parametrize(
    "texts", [[1.0, 2.5, 3.0], ["1.0", "2.5", "3.0"], [1, 2, 3], ["v1.0", "2", "3."]]
)
def test_a_number_that_may_have_a_fraction_is_none_of_that(
    tmp_path: Path, findings: Findings, texts: list[Any]
) -> None:
    write(tmp_path, "train", texts)
    write(tmp_path, "test", [4.0, 5.0] if 2.5 in texts else ["4", "5"])
    assert findings(TEMPLATE) == []


def test_characters_that_were_lost(tmp_path: Path, findings: Findings) -> None:
    write(tmp_path, "train", ["a", "b"])
    lost = "café".encode("latin-1").decode("utf-8", "replace")
    write(tmp_path, "test", ["caf", lost, "a long text in which one of them stands " + lost])
    assert findings(TEMPLATE) == [
        "2 of 3 test rows print U+FFFD, which stands for characters that were lost "
        "(text), the first is d/test.jsonl:2"
    ]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            TEMPLATE.replace("{{ text }}", "{{ text }} {label}"),
            "prompt shows {label} as it stands; the field is {{ label }}",
        ),
        (
            FREE.replace("{{ label }}", "{ label } it is"),
            "answer shows {label} as it stands; the field is {{ label }}",
        ),
        (
            TEMPLATE.replace('"yes"', '"{text}"'),
            "choices shows {text} as it stands; the field is {{ text }}",
        ),
        (
            TEMPLATE.replace("{{ text }}", "{{ text }} {{ row['label'] | upper }}"),
            "the prompt prints label, which the right answer is read from",
        ),
        (
            FREE.replace("{{ text }}", "{{ both }}") + "fields: {both: text ~ label}\n",
            "the prompt prints label, which the right answer is read from",
        ),
    ],
)
def test_slips_of_a_template(
    tmp_path: Path, findings: Findings, template: str, expected: str
) -> None:
    write(tmp_path, "train", ["a", "b", "c"])
    write(tmp_path, "test", ["d", "e"])
    assert findings(template) == [expected]


@pytest.mark.parametrize(
    "prompt",
    [
        '{{ text }} as {"a": {other}}, {{ "{label}" }} {# {label} #}',
        "{{ text }}{% if text == 'no' %}{{ label }}{% endif %}",
    ],
)
def test_what_may_well_be_meant_is_not_told(
    tmp_path: Path, findings: Findings, prompt: str
) -> None:
    write(tmp_path, "train", ["a", "b", "c"])
    write(tmp_path, "test", ["d", "e"])
    assert (
        findings(f"description: d\nprompt: {json.dumps(prompt)}\n{TEMPLATE.split(chr(10), 2)[2]}")
        == []
    )


@pytest.mark.parametrize(
    "template",
    [
        'prompt: "{{ text }} {{ label }}"\nanswer: "{{ text | length + label }}"\n',
        'prompt: "{{ text }}"\nanswer: "{{ text | reverse }}"\n',
        'prompt: "{{ p[0] }}"\nanswer: "{{ p[1] }}"\nfields: {p: "row.both.split(\'|\')"}\n',
        'prompt: "{{ q }}"\nanswer: "{{ a }}"\nfields: {q: "row.both.split(\'|\')[0]", '
        "a: \"row.both.split('|')[1]\"}\n",
        "prompt: \"{{ options | join(', ') }}\"\nchoices: {each: options}\nlabel: both\n"
        'fields: {options: "[both, text] | sort"}\n',
    ],
)
def test_an_answer_made_of_what_is_asked_is_no_slip(
    tmp_path: Path, findings: Findings, template: str
) -> None:
    for split, texts in (("train", "abc"), ("test", "de")):
        rows = [{"text": one, "label": 1, "both": f"{one} asks|{one} says"} for one in texts]
        content = "".join(f"{json.dumps(row)}\n" for row in rows)
        (tmp_path / "d" / f"{split}.jsonl").write_text(content, encoding="utf-8")
    assert findings(f"description: d\n{template}") == []


def test_what_is_learned_is_looked_at_as_what_is_asked(tmp_path: Path, findings: Findings) -> None:
    write(tmp_path, "train", ["a", "b", "c"], [1990.0, 1991.0, 1992.0])
    write(tmp_path, "test", ["d", "e"], ["nan", "None"])
    whole, word = findings(FREE.replace("label", "label | trim"))
    assert whole.startswith(
        "3 of 3 training rows print a whole number as 3.0 (NAME | int writes 3) (label)"
    )
    assert word.startswith(
        "1 of 2 test rows print a word for what is missing, such as nan or None (label)"
    )


def test_numbers_are_counted_by_their_field(tmp_path: Path, findings: Findings) -> None:
    rows = [{"price": 3.0, "age": 41, "label": 0}, {"price": 19.5, "age": 40.0, "label": 1}]
    content = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "d" / "train.jsonl").write_text(content, encoding="utf-8")
    found, _ = findings(TEMPLATE.replace("{{ text }}", "{{ price }} {{ age }}"))
    assert found.startswith("1 of 2 training rows print a whole number as 3.0")
    assert found.endswith("(age), the first is d/train.jsonl:2")


def test_choices_of_each_row_are_not_missing_elsewhere(tmp_path: Path, findings: Findings) -> None:
    write(tmp_path, "train", [f"row {number}" for number in range(12)])
    write(tmp_path, "test", ["new", "newer"])
    own = 'choices: ["{{ text }} no", "{{ text }} yes"]'
    assert findings(TEMPLATE.replace('choices: {0: "no", 1: "yes"}', own)) == []


def test_answers_that_are_not_there_to_be_learned(tmp_path: Path, findings: Findings) -> None:
    template = TEMPLATE.replace('1: "yes"', '1: "yes", 2: "perhaps"')
    texts = [f"row {number}" for number in range(12)]
    write(tmp_path, "train", texts)
    write(tmp_path, "test", ["new", "newer", "newest"], [0, 2, 2])
    assert findings(template) == ["test rows have an answer that no training row has: 'perhaps'"]
    write(tmp_path, "train", texts, [1] * 12)
    assert findings(template) == ["all 12 training rows have the answer 'yes'"]
    write(tmp_path, "test", ["new", "newer"], ["blue", "red"])
    write(tmp_path, "train", texts, [f"answer {number % 3}" for number in range(12)])
    assert findings(FREE) == []  # free answers differ from row to row
