"""Tables as text: what quotation marks, delimiters and headers mean, and what is said where it is not clear."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mtl_lora_cli.data.prepare import read_examples
from mtl_lora_cli.data.sources import read_split, split_fingerprint
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.tasks.registry import find_template
from mtl_lora_cli.tasks.task import Task


def read(folder: Path, name: str, text: str, **keys: Any) -> list[dict[str, Any]]:
    rows, notes = read_all(folder, name, text, **keys)
    assert notes == ()
    return rows


def read_all(
    folder: Path, name: str, text: str, **keys: Any
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    (folder / name).write_text(text, encoding="utf-8", newline="")
    source = Source.model_validate({"path": name} | keys)
    found = read_split(source, "train", base=folder, task="t")
    assert found is not None
    return [dict(row) for row in found.rows], found.notes


def fault(folder: Path, name: str, text: str, **keys: Any) -> str:
    with pytest.raises(UsageError) as caught:
        read_all(folder, name, text, **keys)
    (line,) = caught.value.lines
    return line.removeprefix(f"{folder}/")


QUOTED = (
    'sentence\tlabel\n"Not so fast" , said the film , and slowed down\t0\nA "must see" for all\t1\n'
)
OPEN = (
    'sentence\tlabel\n"It begins like a dream\t1\nThe plot is thin\t0\nIt ends like a dream"\t0\n'
    "A fine little film\t1\nTedious\t0\n"
)


def test_quotation_marks_of_a_tsv_are_text(tmp_path: Path) -> None:
    """As GLUE and PAWS publish them: no row vanishes in a field."""
    assert [row["sentence"] for row in read(tmp_path, "a.tsv", QUOTED)] == [
        '"Not so fast" , said the film , and slowed down',
        'A "must see" for all',
    ]
    rows = read(tmp_path, "a.tsv", OPEN)
    assert [(row["sentence"], row["label"]) for row in rows] == [
        ('"It begins like a dream', "1"),
        ("The plot is thin", "0"),
        ('It ends like a dream"', "0"),
        ("A fine little film", "1"),
        ("Tedious", "0"),
    ]


def test_a_csv_that_has_no_quoting_is_noticed(tmp_path: Path) -> None:
    text = OPEN.replace("\t", ",")
    rows, (note,) = read_all(tmp_path, "a.csv", text)
    assert len(rows) == 3
    assert note.startswith(
        f"{tmp_path}/a.csv: rows that hold line ends in quotation marks and look like several rows: 1, "
        "the first in line 2; where marks are text, say quoting: none"
    )
    assert len(read(tmp_path, "a.csv", text, quoting="none")) == 5
    assert len(read(tmp_path, "a.csv", text, quoting="csv")) == 3


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_files_that_were_joined_bring_no_header_as_a_row(tmp_path: Path, mark: str) -> None:
    text = f"{mark}sentence,label\na,0\n{mark}sentence,label\nb,1\n"
    line = fault(tmp_path, "a.csv", text)
    assert line.startswith("a.csv:3: another file begins here: its header would be read as a row")
    assert len(read(tmp_path, "b.csv", "word\nword\nother\n")) == 2
    rows, (note,) = read_all(tmp_path, "a.csv", text, broken_rows="drop")
    assert [row["sentence"] for row in rows] == ["a", "b"]
    assert note.endswith("lines left out with which another file begins: 1, the first in line 3")


def test_a_byte_order_mark_within_a_file_is_told(tmp_path: Path) -> None:
    """It may be the beginning of a file without a header, or of a text that was found somewhere."""
    rows, (note,) = read_all(tmp_path, "a.tsv", "x\ty\na\t0\n\ufeffb\t1\n")
    assert [row["y"] for row in rows] == ["0", "1"]
    assert (
        "begin with a byte order mark, as where files were joined: 1, the first in line 3" in note
    )


def test_texts_of_several_lines_are_no_rows(tmp_path: Path) -> None:
    text = 'sentence,label\n"Dear Sir, or Madam,\nthank you, and\ngoodbye",1\nno,0\nso,1\n'
    assert [row["label"] for row in read(tmp_path, "a.csv", text)] == ["1", "0", "1"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_any_end_of_line(tmp_path: Path, end: str) -> None:
    for name, text in (("a.tsv", QUOTED), ("a.csv", "sentence,label\na,0\nb,1\n")):
        assert len(read(tmp_path, name, text.replace("\n", end))) == 2


def test_fields_quoted_as_pandas_does_it_are_noticed(tmp_path: Path) -> None:
    import pandas

    texts = ['A "must see" for all', "plain"]
    table = pandas.DataFrame({"sentence": texts, "label": [1, 0]})
    text = table.to_csv(sep="\t", index=False)
    rows, (note,) = read_all(tmp_path, "a.tsv", text)
    assert rows[0]["sentence"] == '"A ""must see"" for all"'
    assert (
        "a.tsv: fields that look quoted as in CSV, read as they stand: 1, the first in line 2"
        in note
    )
    assert [row["sentence"] for row in read(tmp_path, "a.tsv", text, quoting="csv")] == texts
    assert len(read(tmp_path, "a.tsv", text, quoting="none")) == 2
    table.loc[0, "sentence"] = "two\nlines"
    assert fault(tmp_path, "a.tsv", table.to_csv(sep="\t", index=False)) == (
        "a.tsv:2: expected 2 columns (sentence, label), received 1; quotation marks are text here, "
        "say quoting: csv in the source if they are not"
    )
    # As R writes it: all texts in marks, those of the header, too.
    assert fault(tmp_path, "a.tsv", table.to_csv(sep="\t", index=False, quoting=2)) == (
        'a.tsv:1: the column "sentence" is in quotation marks; say quoting: csv in the source, or '
        "quoting: none if they are part of it"
    )


@pytest.mark.parametrize(
    ("name", "text", "keys", "expected"),
    [
        (
            "a.csv",
            'q,n\n1,2\n"a"b,2\n',
            {},
            "a.csv:3: broken quoting: ',' expected after '\"'; where quotation marks are text, say "
            "quoting: none in the source",
        ),
        (
            "a.csv",
            'q,n\n"a\nb","c\n1,2\n3,4\n',
            {},
            "a.csv:3: broken quoting: a quotation mark opens here and never closes; where quotation "
            "marks are text, say quoting: none in the source",
        ),
        (
            "a.tsv",
            'q\tn\r\n1\t2\r\n"a\t2\r\n5\t6\r\n',
            {"quoting": "csv"},
            "a.tsv:3: broken quoting: a quotation mark opens here and never closes; where quotation "
            "marks are text, say quoting: none in the source",
        ),
        (
            "a.csv",
            "sentence;label\ngood;1\n",
            {},
            "a.csv:1: the only column is 'sentence;label'; say delimiter: ';' in the source",
        ),
        (
            "a.csv",
            "sentence\tlabel\ngood, good\t1\n",
            {},
            "a.csv:1: the only column is 'sentence\\tlabel'; say delimiter: '\\t' in the source",
        ),
        (
            "a.tsv",
            "sentence,label\ngood,1\n",
            {},
            "a.tsv:1: the only column is 'sentence,label'; say delimiter: ',' in the source",
        ),
        (
            "a.csv",
            "good|1\n",
            {"columns": ["sentence", "label"]},
            "a.csv:1: expected 2 columns (sentence, label), received 1; say delimiter: '|' in the "
            "source if that is what stands between them",
        ),
        (
            "a.csv",
            "id,Sentence\n1,good\n",
            {"columns": ["sentence", "label"]},
            "a.csv:1: the first line is a header, it has 'Sentence'; columns as a list goes with "
            "files without one, columns: {OLD: NEW} renames",
        ),
        (
            "a.tsv",
            "gj04\t1\t\t\tOur friends.\n",
            {},
            "a.tsv:1: two columns have no name; name those of a file without a header: columns: […]",
        ),
        (
            "a.csv",
            "text,label\na,1\n",
            {"columns": {"txt": "sentence"}},
            "a.csv: columns: no column 'txt'; did you mean 'text'?; there are: text, label",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n',
            {"columns": {"text": "label"}},
            "a.jsonl: columns: 'text' cannot be called 'label', as another is",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n',
            {"quoting": "none"},
            "a.jsonl: quoting goes with CSV, TSV and the like only",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n',
            {"columns": ["text"]},
            "a.jsonl: columns as a list goes with CSV, TSV and the like only",
        ),
    ],
)
def test_the_line_names_the_cure(
    tmp_path: Path, name: str, text: str, keys: dict[str, Any], expected: str
) -> None:
    assert fault(tmp_path, name, text, **keys) == expected


def test_other_delimiters_and_endings(tmp_path: Path) -> None:
    for delimiter, said in ((";", ";"), ("|", "|"), ("\t", "tab")):
        text = f"sentence{delimiter}label\nso, so{delimiter}1\n"
        for name in ("a.csv", "a.tsv", "a.txt", "a"):
            rows = read(tmp_path, name, text, delimiter=said)
            assert rows == [{"sentence": "so, so", "label": "1"}]


def test_columns_rename_in_every_format(tmp_path: Path) -> None:
    names = {"columns": {"text": "sentence", "label": "text"}}
    for name, text in (("a.csv", "text,label\nx,1\n"), ("a.jsonl", '{"text": "x", "label": "1"}')):
        assert read(tmp_path, name, text, **names) == [{"sentence": "x", "text": "1"}]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"delimiter": "||"}, "expected one character, or tab, received '||'"),
        ({"delimiter": '"'}, "expected one character, or tab"),
        ({"quoting": "all"}, "'csv' or 'none'"),
        ({"columns": ["a", "a"]}, "two of the 'columns' have the same name"),
        ({"columns": []}, "at least 1 item"),
        ({"path": None, "hub": "o/n", "quoting": "csv"}, "'quoting' goes with a path only"),
        (
            {"path": None, "hub": "o/n", "columns": ["a"]},
            "'columns' as a list goes with a path only",
        ),
    ],
)
def test_keys_that_mean_nothing(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        Source.model_validate({"path": "a.csv"} | keys)


def test_another_layout_is_another_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("x\ty\n1\t2\n")
    said = [{}, {"quoting": "none"}, {"columns": {"x": "z"}}, {"columns": ["p", "q"]}]
    sources = [Source.model_validate({"path": "a.tsv"} | keys) for keys in said]
    prints = {split_fingerprint(one, "train", base=tmp_path, task="t") for one in sources}
    rows = {read_split(one, "train", base=tmp_path, task="t").fingerprint for one in sources}  # type: ignore[union-attr]
    assert len(prints) == len(rows) == len(said)


# The layouts of the files that GLUE's own server gives out, with texts of our own: template, first
# lines, keys of the source, and what the first row asks for and is answered.
GLUE = {
    "cola": (
        "gj04\t1\t\tOur \"friends\" won't buy this analysis.\ngj04\t0\t*\tThe more we.\n",
        {"columns": ["origin", "label", "mark", "sentence"]},
        ("Sentence: Our \"friends\" won't buy this analysis.", "yes"),
    ),
    "sst2": (
        'sentence\tlabel\n"hide new secretions from the units \t0\n',
        {},
        ('Review: "hide new secretions from the units', "negative"),
    ),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
        '1\t70\t71\t"I said so , " he said .\tHe said : " I said so . "\n',
        {"columns": {"Quality": "label", "#1 String": "sentence1", "#2 String": "sentence2"}},
        ('Sentence 1: "I said so , " he said .\nSentence 2: He said : " I said so . "', "yes"),
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        '7\t1\t2\t"Can you say ""no""?"\tHow do I say "no"?\t0\n'
        '"\tWas he a real figure? What is the evidence?\t0\n',
        {"columns": {"is_duplicate": "label"}, "quoting": "none", "broken_rows": "drop"},
        ('Question 1: "Can you say ""no""?"\nQuestion 2: How do I say "no"?', "no"),
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\tA plane.\tAn air plane.\t5.000\n",
        {"columns": {"score": "label"}},
        ("Sentence 1: A plane.\nSentence 2: An air plane.", "5.0"),
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
        '0\t31\t31n\tgovernment\t( a )\t( b )\t(ROOT a)\t(ROOT b)\t"Cream" skims.\tIt skims.\t'
        "neutral\tneutral\n",
        {"columns": {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"}},
        ('Premise: "Cream" skims.\nHypothesis: It skims.', "maybe"),
    ),
    "qnli": (
        'index\tquestion\tsentence\tlabel\n0\tWhen did it air?\tIt "aired" in May.\tnot_entailment\n',
        {},
        ('Question: When did it air?\nSentence: It "aired" in May.', "no"),
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel\n0\tNo weapons found.\tWeapons found.\tnot_entailment\n",
        {},
        ("Premise: No weapons found.\nHypothesis: Weapons found.", "no"),
    ),
    "wnli": (
        "index\tsentence1\tsentence2\tlabel\n0\tI put it in. It had a hole.\tThe hole.\t1\n",
        {},
        ("Text: I put it in. It had a hole.\nStatement: The hole.", "yes"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GLUE)
def test_glue_s_own_files_are_read_as_published(tmp_path: Path, name: str) -> None:
    text, keys, (prompt, answer) = GLUE[name]
    (tmp_path / "train.tsv").write_text(text, encoding="utf-8")
    full, path, template = find_template(name, None)
    source = Source.model_validate({"path": str(tmp_path)} | keys)
    task = Task(name, 0, full, path.read_text(encoding="utf-8"), template, source)
    examples = read_examples(task, "train")
    assert examples is not None
    assert examples.examples[0].prompt.startswith(prompt)
    assert examples.examples[0].answer == answer
    dropped = [
        f"{tmp_path}/train.tsv: rows left out for another number of fields: 1, the first in line 3"
    ]
    assert list(examples.notes) == (dropped if name == "qqp" else [])
