"""Metrics of the paper's tasks: as public packages count the same answers. Their figures are kept, with who gave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_lora_cli.metrics import METRICS, Outcome
from mtl_lora_cli.metrics.outcome import joined

KEPT: dict[str, Any] = json.loads(
    (Path(__file__).parent / "answers_about_pictures.json").read_text(encoding="utf-8")
)


def outcome(pairs: list[Any]) -> Outcome:
    zeros = np.zeros(len(pairs), np.int64)
    references = [one if isinstance(one, str) else joined(one) for one, _ in pairs]
    return Outcome(
        zeros, zeros, references=np.asarray(references), answers=np.asarray([a for _, a in pairs])
    )


@pytest.mark.parametrize(
    ("metric", "key"),
    [("vqa_accuracy", "vqa"), ("relaxed_accuracy", "relaxed"), ("gqa_accuracy", "gqa")],
)
def test_each_answer_counts_as_elsewhere(metric: str, key: str) -> None:
    rows = KEPT[key]
    given = outcome([row[:2] for row in rows])
    each = METRICS[metric].raw(given, np.eye(len(rows)))
    for row, value in zip(rows, each, strict=True):
        assert value == pytest.approx(row[2], abs=1e-9), row
    assert 0 < each.mean() < 1
    assert METRICS[metric].value(given) == pytest.approx(np.mean([row[2] for row in rows]))


def test_captions_count_as_elsewhere_also_where_some_are_drawn_twice() -> None:
    given, drawn = outcome(KEPT["captions"]), KEPT["drawn"]
    weights = np.stack([np.ones(len(given.gold)), np.bincount(drawn, minlength=len(given.gold))])
    values = METRICS["cider"].raw(given, weights)
    assert values == pytest.approx([KEPT["cider"], KEPT["cider_drawn"]], rel=1e-12)
    assert METRICS["cider"].value(given.take(np.asarray(drawn))) == pytest.approx(values[1])


def test_captions_are_words_whatever_their_case_and_marks() -> None:
    rows = [[["A man, on a horse."], "a man on a HORSE"], [["two dogs"], "Two dogs!"]]
    given = outcome(rows)
    plain = outcome([[["a man on a horse"], "a man on a horse"], [["two dogs"], "two dogs"]])
    # All n-grams are equal; the second has none of three and four words.
    assert METRICS["cider"].value(given) == METRICS["cider"].value(plain) == pytest.approx(7.5)


def test_captions_that_share_no_word_or_have_none_are_worth_nothing() -> None:
    given = outcome([[["a red bus", "x"], ""], [["b"], "something else"]])
    assert METRICS["cider"].raw(given, np.array([[1, 1], [2, 0]])).tolist() == [0, 0]


def test_one_answer_is_not_what_several_people_say() -> None:
    lonely = outcome([["yes", "yes"], ["no", "yes"]])
    assert "of several people" in str(METRICS["vqa_accuracy"].undefined(lonely))


def test_metrics_of_texts_take_the_nearest_of_several() -> None:
    given = outcome([[["a red bus", "the blue cat"], "blue cat"], [["3", "4"], "4"]])
    assert METRICS["token_f1"].value(given) == 1.0
    assert METRICS["number"].value(given) == 0.5
    from sacrebleu.metrics.bleu import BLEU

    streams = [["a red bus", "3"], ["the blue cat", "4"]]
    wanted = BLEU().corpus_score(["blue cat", "4"], streams).score / 100
    assert METRICS["bleu"].value(given) == pytest.approx(wanted)
