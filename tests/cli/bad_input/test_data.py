"""Bad sources, files and rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .mistakes import POINTER, ROWS, TRAIN, Bad, more, recipe

CASES = [
    Bad(
        "missing data file",
        ("TMP/color.jsonl: source of task 'color': no such file or folder",),
        files={"color.jsonl": None},
        early=False,
    ),
    Bad(
        "empty data file",
        ("TMP/color.jsonl: has no rows, expected at least one",),
        files={"color.jsonl": ""},
        early=False,
    ),
    Bad(
        "a source without a train split",
        ("task 'color': its source has no train split",),
        files={**recipe("color.jsonl", "folder"), "folder/test.jsonl": ROWS},
        early=False,
    ),
    Bad(
        "a test split whose labels are kept back",
        (
            "TMP/folder/test.jsonl:1: task 'color': label: received '?', expected one of 'yes', 'no'; "
            "no test row has a right answer, as where labels are kept back: leave the split out with "
            "source: {path: TMP/folder, splits: {train: train.jsonl}}",
        ),
        files={
            **recipe("color.jsonl", "folder"),
            "folder/train.jsonl": ROWS,
            "folder/test.jsonl": '{"word": "blue", "label": "?"}\n',
        },
        early=False,
    ),
    Bad(
        "a folder of several data sets",
        (
            "TMP/folder: source of task 'color': holds several data sets: one, two/data; name one: "
            "path: TMP/folder/one",
        ),
        files={
            **recipe("color.jsonl", "folder"),
            "folder/one/train.jsonl": ROWS,
            "folder/two/data/train.jsonl": ROWS,
        },
        early=False,
    ),
    Bad(
        "unknown key of a source: tasks show",
        ("--source:1: quotin: unknown key; did you mean 'quoting'?",),
        ("tasks", "show", "color.yaml", "--source", "{path: color.jsonl, quotin: none}"),
    ),
    Bad(
        "a sample's name that is none: tasks show",
        ("…",),
        ("tasks", "show", "sst2", "--source", "sample:a b"),
    ),
    Bad(
        "a task of a column by the name that stands for all",
        ("recipe.yaml:3: tasks.0.name: a task cannot be called 'all': --task all stands for every …",),
        files={
            **recipe("color.jsonl", "{path: rows.jsonl, task_column: kind}"),
            "rows.jsonl": '{"word": "red", "label": "yes", "kind": "all"}\n',
        },
        early=False,
    ),
    Bad(
        "a task's name in the data that leads out of a folder",
        (
            "TMP/rows.jsonl:1: kind: '../../out' cannot be a task's name: letters, digits, '.', '_' and "
            "'-', the first a letter or a digit, 80 at most; give such values names in task_names",
        ),
        files={
            **recipe("color.jsonl", "{path: rows.jsonl, task_column: kind}"),
            "rows.jsonl": '{"word": "red", "label": "yes", "kind": "../../out"}\n',
        },
        early=False,
    ),
    Bad(
        "a line that is no JSON",
        ("TMP/color.jsonl:2: not valid JSON: …",),
        files={"color.jsonl": ROWS.replace('{"word": "dog"', '{word: "dog"')},
        early=False,
    ),
    Bad(
        "rows that are a Git LFS pointer",
        ("TMP/color.jsonl is a Git LFS pointer, not the file: git lfs pull",),
        files={"color.jsonl": POINTER},
        early=False,
    ),
    Bad(
        "rows that are a web page",
        ("TMP/color.jsonl is a web page, not the file: download the file itself",),
        files={"color.jsonl": "\n<!DOCTYPE html>\n<html></html>\n"},
        early=False,
    ),
    Bad(
        "a table with another delimiter",
        (
            "TMP/color.csv:1: the only column is 'word;label'; say delimiter: ';' in the source",
        ),
        files={**recipe("color.jsonl", "color.csv"), "color.csv": "word;label\nred;yes\n"},
        early=False,
    ),
    Bad(
        "a quotation mark that never closes",
        (
            "TMP/color.csv:3: broken quoting: a quotation mark opens here and never closes; where "
            "quotation marks are text, say quoting: none in the source",
        ),
        files={
            **recipe("color.jsonl", "color.csv"),
            "color.csv": 'word,label\nred,yes\n"dog,no\ncat,no\n',
        },
        early=False,
    ),
    Bad(
        "a row with another number of fields",
        (
            "TMP/color.tsv:3: expected 2 columns (word, label), received 3; broken_rows: drop in "
            "the source leaves such rows out",
        ),
        files={
            **recipe("color.jsonl", "color.tsv"),
            "color.tsv": "word\tlabel\nred\tyes\ndog\tno\tno\n",
        },
        early=False,
    ),
    Bad(
        "columns of a file that has a header",
        (
            "TMP/color.csv:1: the first line is a header, it has 'word'; columns as a list goes with "
            "files without one, columns: {OLD: NEW} renames",
        ),
        files={
            **recipe("color.jsonl", "{path: color.csv, columns: [word, label]}"),
            "color.csv": "word,label\nred,yes\n",
        },
        early=False,
    ),
    Bad(
        "a row that lacks a field",
        (
            "TMP/color.jsonl:2: task 'color': prompt: the row has no field 'word'; "
            "it has: wort, label; did you mean 'wort'?",
        ),
        files={"color.jsonl": ROWS.replace('"word": "dog"', '"wort": "dog"')},
        early=False,
    ),
    Bad(
        "a row that lacks its label",
        ("TMP/color.jsonl:2: task 'color': label: the row has no field 'label'; it has: word",),
        files={"color.jsonl": ROWS.replace(', "label": "no"', "")},
        early=False,
    ),
    Bad(
        "an empty field where the prompt prints a text",
        (
            "TMP/color.jsonl:2: task 'color': word: is empty or blank, expected a text (1 of 2 training "
            "rows have such a field); blank_fields: note goes on",
        ),
        files={
            **more("blank_fields: error\n"),
            "color.jsonl": '{"word": "red", "label": "yes"}\n{"word": " ", "label": "no"}\n',
        },
        early=False,
    ),
    Bad(
        "a control token in a row",
        (
            "TMP/color.jsonl:2: task 'color': the row holds </s>, a control token of the tokenizer, and "
            "control_tokens is error; text and token go on",
        ),
        (*TRAIN, "control_tokens=error"),
        {"color.jsonl": '{"word": "red", "label": "yes"}\n{"word": "a</s>b", "label": "no"}\n'},
        early=False,
    ),
    Bad(
        "chat without a chat template",
        ("prompt_format: chat needs a tokenizer with a chat template; use plain",),
        (*TRAIN, "prompt_format=chat"),
        early=False,
    ),
    Bad(
        "an example longer than a row",
        (
            "TMP/color.jsonl:1: task 'color': the example has 14 tokens, rows hold 8 "
            "(2 of 2 examples are too long); raise training.row_length, "
            "or set training.on_overflow to drop or truncate_prompt",
        ),
        files=more("training: {row_length: 8, on_overflow: error}\n"),
        early=False,
    ),
    Bad(
        "a share of no example",
        (
            "tasks: an epoch would draw no example: 'repeat' times the examples of each task rounds "
            "to 0",
        ),
        files=recipe("color.jsonl\n", "color.jsonl\n    repeat: 0.1\n"),
        early=False,
    ),
    Bad(
        "more examples than an epoch can hold",
        ("tasks: an epoch would draw 1,000,000,000,000,000 examples, more than 268,435,456; …",),
        files=recipe("color.jsonl\n", "color.jsonl\n    repeat: 1.0e+300\n"),
        early=False,
    ),
    Bad(
        "unknown task: data show",
        ("unknown task 'colour'; did you mean 'color'?…",),
        ("data", "show", "recipe.yaml", "--task", "colour"),
        early=False,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Bad, refused: Callable[[Bad], None]) -> None:
    refused(case)
