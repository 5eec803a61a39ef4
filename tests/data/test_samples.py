"""The bundled sample data: as make.py writes it, without overlap, and without a way around it."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SAMPLES = Path(__file__).parents[2] / "data_templates" / "samples"
TASKS = ("animals", "uses", "search_ads")
FIELDS = {
    "animals": ["question", "answer"],
    "uses": ["question", "options", "answer"],
    "search_ads": ["query", "ad", "grade"],
}


def _load_make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("samples_make", SAMPLES / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


make = _load_make()
EXAMPLES = make.build()


def _rows(task: str, split: str) -> list[dict[str, Any]]:
    lines = (SAMPLES / task / f"{split}.jsonl").read_text("ascii").splitlines()
    return [json.loads(line) for line in lines]


def _text(row: dict[str, Any]) -> str:
    return " | ".join(v if isinstance(v, str) else " | ".join(v) for v in row.values())


def _train_words() -> set[str]:
    words: set[str] = set()
    for task in TASKS:
        for row in _rows(task, "train"):
            words |= make.content_words(_text(row))
    return words


def _share_of_largest(labels: Iterable[str]) -> float:
    counts = Counter(labels)
    return max(counts.values()) / counts.total()


def _spread(counts: Iterable[int]) -> int:
    values = list(counts)
    return max(values) - min(values)


def test_files_are_what_the_script_writes() -> None:
    files = make.render()
    assert sorted(files) == sorted(f"{t}/{s}.jsonl" for t in TASKS for s in ("train", "test"))
    for name, text in files.items():
        assert (SAMPLES / name).read_bytes() == text.encode("ascii"), name


def test_check_reports_a_changed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "HERE", tmp_path)
    assert make.main(["--check"]) == 1
    assert make.main([]) == 0
    assert make.main(["--check"]) == 0
    changed = tmp_path / "uses" / "test.jsonl"
    changed.write_text(changed.read_text("ascii") + "\n", "ascii")
    assert make.main(["--check"]) == 1


@pytest.mark.parametrize("task", TASKS)
def test_rows_have_the_fields_and_counts(task: str) -> None:
    train, test = _rows(task, "train"), _rows(task, "test")
    assert 200 <= len(train) <= 400
    assert len(test) >= 200
    for row in train + test:
        assert list(row) == FIELDS[task]
        # Digits are tokenised in a way of their own by some models, and no task needs one.
        assert not re.search(r"\d|  |\{|\}", _text(row)), row
        assert len(_text(row).split()) <= 30, row


@pytest.mark.parametrize("task", TASKS)
def test_no_row_twice(task: str) -> None:
    texts = [_text(row) for split in ("train", "test") for row in _rows(task, split)]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("task", TASKS)
def test_no_test_entity_in_train(task: str) -> None:
    # Against the train rows of all three tasks: the quickstart trains on them together.
    seen = _train_words()
    for example in EXAMPLES[task]["test"]:
        for entity in example.entities:
            words = make.content_words(entity)
            assert words and not words & seen, entity


@pytest.mark.parametrize("task", TASKS)
def test_entities_stand_in_their_rows(task: str) -> None:
    for split in ("train", "test"):
        for example in EXAMPLES[task][split]:
            for entity in example.entities:
                assert entity in _text(example.row), example


@pytest.mark.parametrize("task", TASKS)
def test_no_test_wording_in_train(task: str) -> None:
    wordings = {
        split: {w for example in EXAMPLES[task][split] for w in example.wordings}
        for split in ("train", "test")
    }
    assert not wordings["train"] & wordings["test"]
    train_rows = [_text(row) for row in _rows(task, "train")]
    for wording in wordings["test"]:
        # As a pattern over the rows themselves, whatever stands in the gap.
        pattern = re.compile(
            r"\b" + re.sub(r"\\\{\w+\\\}", r"[\\w ]+", re.escape(wording)), re.IGNORECASE
        )
        assert not any(pattern.search(row) for row in train_rows), wording
        assert any(pattern.search(_text(row)) for row in _rows(task, "test")), wording


def test_no_use_of_test_in_train() -> None:
    options = {
        split: {option for row in _rows("uses", split) for option in row["options"]}
        for split in ("train", "test")
    }
    assert not options["train"] & options["test"]


@pytest.mark.parametrize(
    ("task", "limit"), [("animals", 0.501), ("uses", 0.26), ("search_ads", 0.334)]
)
def test_labels_are_balanced(task: str, limit: float) -> None:
    for split in ("train", "test"):
        assert _share_of_largest(example.label for example in EXAMPLES[task][split]) <= limit


@pytest.mark.parametrize("task", TASKS)
def test_wordings_tell_nothing_about_the_label(task: str) -> None:
    for split in ("train", "test"):
        examples = EXAMPLES[task][split]
        labels = {example.label for example in examples}
        counts = Counter((example.wordings, example.label) for example in examples)
        for wordings in {example.wordings for example in examples}:
            assert _spread(counts[wordings, label] for label in labels) <= 1, wordings


def test_things_of_the_two_labels_differ() -> None:
    for split in ("train", "test"):
        things = [thing for _, thing in make.things(split)]
        assert len(set(things)) == len(things)


def test_options_tell_nothing_without_the_question() -> None:
    # Every use is right once for each three times it is wrong: neither a favourite option, nor
    # its length, nor its place beats one in four.
    for split in ("train", "test"):
        rows = _rows("uses", split)
        offered = Counter(option for row in rows for option in row["options"])
        right = Counter(row["answer"] for row in rows)
        assert all(offered[option] == 4 * right[option] for option in offered)
        for row in rows:
            assert len(set(row["options"])) == 4
            assert row["options"].count(row["answer"]) == 1
        places = Counter(row["options"].index(row["answer"]) for row in rows)
        assert _spread(places.values()) <= 1


def test_wrong_options_come_from_other_themes() -> None:
    for split in ("train", "test"):
        theme_of = {use: theme for theme, _, use in make.uses(split)}
        assert len(theme_of) == len(make.uses(split))
        for row in _rows("uses", split):
            assert len({theme_of[option] for option in row["options"]}) == 4, row
            words = [make.content_words(option) for option in row["options"]]
            assert len(set().union(*words)) == sum(map(len, words)), row


def test_a_use_does_not_repeat_its_thing() -> None:
    for split in ("train", "test"):
        for _, thing, use in make.uses(split):
            starts = [{w[:4] for w in make.content_words(text)} for text in (thing, use)]
            assert not starts[0] & starts[1], thing


def test_grades_follow_the_definition() -> None:
    for split in ("train", "test"):
        shelf = {p: family for family in make.SHELVES[split] for p in family.products}
        assert len(shelf) == 4 * len(make.SHELVES[split])
        for example in EXAMPLES["search_ads"][split]:
            asked, product, offered, other = example.entities
            assert asked in shelf[product].attributes and offered in shelf[other].attributes
            if example.label == "relevant":
                assert (asked, product) == (offered, other)
            elif example.label == "partial":
                assert shelf[product] is shelf[other]
                assert (asked == offered) != (product == other)
            else:
                assert shelf[product].area != shelf[other].area


def test_neither_query_nor_ad_alone_tells_the_grade() -> None:
    for split in ("train", "test"):
        examples = EXAMPLES["search_ads"][split]
        for name, part in (("query", lambda e: e.row["query"]), ("ad", lambda e: e.row["ad"])):
            # The best guess from this text alone, each text's words weighed with the others' rows.
            counts = Counter(
                (word, e.label) for e in examples for word in make.content_words(part(e))
            )
            right = 0
            for example in examples:
                scores = dict.fromkeys(make.GRADES, 0.0)
                for word in make.content_words(part(example)):
                    others = {g: counts[word, g] - (g == example.label) for g in make.GRADES}
                    total = sum(others.values())
                    for grade in make.GRADES:
                        scores[grade] += others[grade] / total if total else 0.0
                right += max(scores, key=lambda grade: scores[grade]) == example.label
            assert right / len(examples) <= 0.4, (split, name)
