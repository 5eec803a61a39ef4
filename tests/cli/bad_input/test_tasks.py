"""Bad templates, and labels and answers that do not fit them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .mistakes import ROWS, TEMPLATE, Bad, recipe

CASES = [
    Bad(
        "unknown template",
        (
            "recipe.yaml:4: tasks.0.template: unknown template 'glue/sst3'; "
            "did you mean 'glue/sst2'?",
        ),
        files=recipe("color.yaml", "glue/sst3"),
        early=False,
    ),
    Bad(
        "a fault in a template",
        ("TMP/color.yaml:5: scorring: unknown key; did you mean 'scoring'?",),
        files={"color.yaml": TEMPLATE + "scorring: argmax\n"},
        early=False,
    ),
    Bad(
        "unknown template: tasks show",
        ("unknown template 'sst3'; did you mean 'sst2'?",),
        ("tasks", "show", "sst3"),
    ),
    Bad(
        "a template that reaches for Python",
        ("TMP/color.jsonl:1: task 'color': prompt: access to attribute '__class__' of …",),
        files={"color.yaml": TEMPLATE.replace("{{ word }}", "{{ word.__class__.__mro__ }}")},
        early=False,
    ),
    Bad(
        "a list in a prompt",
        (
            "TMP/color.jsonl:1: task 'color': prompt: a list (['red']) would be printed; in this row: "
            "word; say how, as in {{ word | join(', ') }}",
        ),
        files={"color.jsonl": '{"word": ["red"], "label": "yes"}\n'},
        early=False,
    ),
    Bad(
        "a method in a prompt",
        (
            "TMP/color.jsonl:1: task 'color': prompt: the method 'title' would be printed; in this row "
            "word has no field of that name",
        ),
        files={"color.yaml": TEMPLATE.replace("{{ word }}", "{{ word.title }}")},
        early=False,
    ),
    Bad(
        "a field with the name of the row",
        (
            "TMP/color.jsonl:1: task 'color': row: the template reads the whole row under this name, "
            "which a field of it has, too; call that another: columns: {row: …} in the source",
        ),
        files={
            "color.yaml": TEMPLATE.replace("{{ word }}", "{{ row['word'] }}"),
            "color.jsonl": '{"word": "red", "label": "yes", "row": 7}\n',
        },
        early=False,
    ),
    Bad(
        "a label outside the choices",
        (
            "TMP/color.jsonl:2: task 'color': label: received 'maybe', "
            "expected one of 'yes', 'no'",
        ),
        files={"color.jsonl": ROWS.replace('"no"', '"maybe"')},
        early=False,
    ),
    Bad(
        "a label outside the choices: validate",
        (
            "TMP/color.jsonl:2: task 'color': label: received 'maybe', "
            "expected one of 'yes', 'no'",
        ),
        ("validate", "recipe.yaml"),
        {"color.jsonl": ROWS.replace('"no"', '"maybe"')},
        early=False,
    ),
    Bad(
        "a label that only looks like one",
        (
            "TMP/color.jsonl:2: task 'color': label: received 'n\u03bf' (written 'n\\u03bf'), "
            "expected one of 'yes', 'no'",
        ),
        files={"color.jsonl": ROWS.replace('"no"', '"n\u03bf"')},
        early=False,
    ),
    Bad(
        "a label that is an index and an option",
        (
            "TMP/color.jsonl:1: task 'color': label: 2 fits in two ways: as the option '2' and as the "
            "index of '3'; say which with choices: {each: …, labels: …}",
        ),
        ("validate", "recipe.yaml"),
        {
            "color.yaml": "description: x\nprompt: '{{ word }}'\nlabel: label\nchoices: {each: options}\n",
            "color.jsonl": '{"word": "two", "options": ["1", "2", "3"], "label": 2}\n',
        },
        early=False,
    ),
    Bad(
        "a label that is an index and a text of the list",
        (
            "TMP/color.jsonl:1: task 'color': label: 1 fits in two ways: as the option '1' and as the "
            "index of '2'; say which with choices: {label: text, …}",
        ),
        ("validate", "recipe.yaml"),
        {
            "color.yaml": "description: x\nprompt: '{{ word }}'\nlabel: label\nchoices: ['1', '2']\n",
            "color.jsonl": '{"word": "two", "label": 1}\n',
        },
        early=False,
    ),
    Bad(
        "a label that fits two labels in other letters",
        ("TMP/color.jsonl:1: task 'color': label: 'YES' fits two of 'yes', 'Yes'",),
        ("validate", "recipe.yaml"),
        {
            "color.yaml": "description: x\nprompt: '{{ word }}'\nlabel: label\nchoices: {'yes': a, 'Yes': b}\n",
            "color.jsonl": '{"word": "two", "label": "YES"}\n',
        },
        early=False,
    ),
    Bad(
        "a right answer that its own stop text cuts",
        (
            "TMP/color.jsonl:2: task 'color': generate.stop ',' stands in the answer 'red, blue' and "
            "ends it: it could never be right",
        ),
        ("validate", "recipe.yaml"),
        {
            "color.yaml": "description: x\nprompt: '{{ word }}'\nanswer: '{{ label }}'\ngenerate: {stop: [',']}\n",
            "color.jsonl": '{"word": "one", "label": "red"}\n{"word": "two", "label": "red, blue"}\n',
        },
        early=False,
    ),
    Bad(
        "a right answer of two lines that is read to the line's end",
        (
            "TMP/color.jsonl:1: task 'color': generate.stop '\\n' stands in the answer 'red\\nblue' and "
            "ends it: it could never be right",
        ),
        ("validate", "recipe.yaml"),
        {
            "color.yaml": "description: x\nprompt: '{{ word }}'\nanswer: '{{ label }}'\ngenerate: {stop: [\"\\n\"]}\n",
            "color.jsonl": '{"word": "one", "label": "red\\nblue"}\n',
        },
        early=False,
    ),
    Bad(
        "a right answer in which nothing is found",
        (
            "TMP/color.jsonl:2: task 'color': generate.extract '[0-9]+' finds nothing in the answer "
            "'none': it could never be right",
        ),
        ("validate", "recipe.yaml"),
        {
            "color.yaml": "description: x\nprompt: '{{ word }}'\nanswer: '{{ label }}'\ngenerate: {extract: '[0-9]+'}\n",
            "color.jsonl": '{"word": "one", "label": "1"}\n{"word": "two", "label": "none"}\n',
        },
        early=False,
    ),
    Bad(
        "metrics that do not fit a task's answers",
        ("recipe.yaml:5: tasks.0.metrics: 'rouge_l' does not fit; possible here: accuracy…",),
        files={"recipe.yaml": "base_model: STORIES\ntasks:\n  - name: a\n    template: color.yaml\n    metrics: [rouge_l]\n"},
        early=False,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Bad, refused: Callable[[Bad], None]) -> None:
    refused(case)
