"""Metrics of free answers beside the libraries and the published scripts that they come from."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from mtl_lora_cli.metrics import METRICS, Outcome
from mtl_lora_cli.metrics.intervals import measure
from mtl_lora_cli.metrics.texts import number_in

RIGHT = [
    "The cat sat on the mat.",
    "Paris",
    "It comes to 42",
    "no one knows",
    "A red dog runs fast",
]
GIVEN = ["A cat sat on a mat", "Paris, of course", "It comes to 41", "", "the red dog ran fast"]


def of(references: list[str], answers: list[str]) -> Outcome:
    zero = np.zeros(len(references), dtype=int)
    return Outcome(zero, zero, references=np.array(references), answers=np.array(answers))


def rouge(right: list[str], given: list[str]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return float(
        np.mean([scorer.score(r, g)["rougeL"].fmeasure for r, g in zip(right, given, strict=True)])
    )


def corpus_bleu(right: list[str], given: list[str]) -> float:
    import sacrebleu

    return sacrebleu.corpus_bleu(given, [right]).score / 100


def corpus_chrf(right: list[str], given: list[str]) -> float:
    import sacrebleu

    return sacrebleu.corpus_chrf(given, [right]).score / 100


@pytest.mark.parametrize(
    ("name", "other"), [("rouge_l", rouge), ("bleu", corpus_bleu), ("chrf", corpus_chrf)]
)
def test_a_value_is_the_library_s(
    name: str, other: Callable[[list[str], list[str]], float]
) -> None:
    """Weights are repetitions, also where a score is of all answers together."""
    outcome = of(RIGHT, GIVEN)
    assert METRICS[name].value(outcome) == pytest.approx(other(RIGHT, GIVEN), abs=1e-9)
    drawn = np.array([0, 0, 1, 4, 4])
    weights = np.bincount(drawn, minlength=5)[None]
    expected = other([RIGHT[n] for n in drawn], [GIVEN[n] for n in drawn])
    assert METRICS[name].raw(outcome, weights)[0] == pytest.approx(expected, abs=1e-9)
    measured = measure(name, outcome)
    assert measured.low is not None and measured.value is not None and measured.high is not None
    assert measured.low <= measured.value <= measured.high


@pytest.mark.parametrize(
    ("right", "given", "value"),
    [
        ("the cat", "A cat.", 1.0),  # articles, case and punctuation do not count
        ("the", "", 1.0),  # nothing is left of both
        ("cat", "", 0.0),
        ("a b c d", "b c", 2 * 2 / (3 + 2)),
        ("x x y", "x", 2 * 1 / 4),
    ],
)
def test_token_f1_by_hand(right: str, given: str, value: float) -> None:
    assert METRICS["token_f1"].value(of([right], [given])) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = <<3+4=7>>7 eggs.\n#### 7", 7),
        ("#### -1,234", -1234),
        ("#### $18.00", 18),
        ("So it is 12, or 13.", 13),
        ("That is $1,000.50.", 1000.5),
        ("#### 5\nbut 6", 5),
        ("no number", None),
        ("-3.5%", -3.5),
        (".5", 0.5),
    ],
)
def test_numbers_as_gsm8k_reads_them(text: str, number: float | None) -> None:
    found = number_in(text)
    assert (None if found is None else float(found)) == number


def test_number_is_the_share_of_right_ones() -> None:
    outcome = of(["#### 42", "#### 7", "#### 8"], ["it is 42.0", "#### 8", "none"])
    assert METRICS["number"].value(outcome) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("right", "given", "valid", "fields"),
    [
        ('{"a": 1, "b": [2, 3]}', '{"b": [2, 3], "a": 1.0}', 1, 1),
        ('{"a": 1, "b": 2}', '{"a": 1, "c": 2}', 1, 1 / 3),
        ('{"a": 1}', "a: 1", 0, 0),
        ('{"a": 1}', '{"a": true}', 1, 0),
        ('{"a": {}}', '{"a": {}}', 1, 1),
        ('{"a": []}', '{"a": {}}', 1, 0),
        ('{"a": 1}', 'Sure: {"a": 1}', 0, 0),
        ("[]", "[]", 1, 1),
    ],
)
def test_json(right: str, given: str, valid: float, fields: float) -> None:
    outcome = of([right], [given])
    assert METRICS["valid_json"].value(outcome) == valid
    assert METRICS["json_fields"].value(outcome) == pytest.approx(fields)


def test_a_right_answer_that_is_no_json_leaves_its_metric_undefined() -> None:
    measured = measure("json_fields", of(["x"], [json.dumps({})]))
    assert (measured.value, measured.why) == (None, "a right answer is no JSON")
