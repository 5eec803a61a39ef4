"""Each metric, written once in weighted form, is scikit-learn's or scipy's on the same examples."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.metrics import CHOICES, LABELS, METRICS, TWO, VALUES, Outcome, metric
from mtl_lora_cli.metrics.declare import Of, direction, find, fitting
from mtl_lora_cli.metrics.intervals import bootstrap

DOCS = Path(__file__).resolve().parents[2] / "docs"
ROW = re.compile(
    r"^\| ((?:`\w+`(?:, )?)+) \| ([^|;]+?)(?:; [^|]+)? \| (Wilson|bootstrap) \|$", re.M
)


def _macro(o: Outcome) -> float:
    labels = [label for label in np.union1d(o.gold, o.predicted) if label >= 0]
    return sk.f1_score(o.gold, o.predicted, labels=labels, average="macro", zero_division=0.0)


OTHERS: dict[str, Callable[[Outcome], float]] = {
    "accuracy": lambda o: sk.accuracy_score(o.gold, o.predicted),
    "exact_match": lambda o: sk.accuracy_score(o.gold, o.predicted),
    "macro_f1": _macro,
    "matthews": lambda o: sk.matthews_corrcoef(o.gold, o.predicted),
    "quadratic_kappa": lambda o: sk.cohen_kappa_score(o.gold, o.predicted, weights="quadratic"),
    "f1": lambda o: sk.f1_score(o.gold == o.positive, o.predicted == o.positive),
    "roc_auc": lambda o: sk.roc_auc_score(o.gold == o.positive, o.positive_score),
    "pearson": lambda o: stats.pearsonr(o.gold_value, o.predicted_value).statistic,
    "spearman": lambda o: stats.spearmanr(o.gold_value, o.predicted_value).statistic,
}


def outcome_for(name: str, generator: np.random.Generator, examples: int = 60) -> Outcome:
    """Random answers with many ties, some of which name no choice."""
    two = find(name).of is TWO
    classes = 2 if two else 3
    return Outcome(
        gold=generator.integers(0, classes, examples),
        predicted=generator.integers(0 if two else -1, classes, examples),
        gold_value=generator.integers(0, 5, examples).astype(float),
        predicted_value=generator.normal(size=examples).round(1),
        positive_score=generator.random(examples).round(1),
        positive=int(generator.integers(2)),
    )


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_a_value_is_the_other_library_s(name: str) -> None:
    generator = np.random.default_rng(0)
    for _ in range(10):
        outcome = outcome_for(name, generator)
        assert find(name).value(outcome) == pytest.approx(OTHERS[name](outcome), abs=1e-12)


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_a_weight_is_an_example_that_stands_so_often(name: str) -> None:
    generator = np.random.default_rng(1)
    outcome = outcome_for(name, generator)
    places = generator.integers(60, size=(10, 60))
    weights = np.stack([np.bincount(row, minlength=60) for row in places])
    expected = [OTHERS[name](outcome.take(row)) for row in places]
    assert find(name).raw(outcome, weights) == pytest.approx(expected, abs=1e-12)


def test_an_interval_is_a_bootstrap_around_the_other_library() -> None:
    """Row by row with the draws of versions that did it so: their stored intervals hold."""
    for name in ("roc_auc", "pearson", "spearman"):
        outcome = outcome_for(name, np.random.default_rng(2), 50)
        draws = np.random.default_rng(0)
        expected = [OTHERS[name](outcome.take(draws.integers(50, size=50))) for _ in range(1000)]
        assert bootstrap(find(name), outcome) == pytest.approx(expected, abs=1e-12)


def test_a_class_that_a_resample_lacks_moves_no_other() -> None:
    """Where kappa differs from scikit-learn's on the drawn rows alone: 0 and 2 stay two apart."""
    outcome = Outcome(np.array([0, 2, 1, 2]), np.array([0, 0, 1, 2]))
    lacking, places = np.array([[1, 1, 0, 2]]), np.array([0, 1, 3, 3])
    ours = find("quadratic_kappa").raw(outcome, lacking)[0]
    alone = OTHERS["quadratic_kappa"](outcome.take(places))
    kept = sk.cohen_kappa_score(
        outcome.gold[places], outcome.predicted[places], weights="quadratic", labels=[0, 1, 2]
    )
    assert ours == pytest.approx(kept, abs=1e-12)
    assert ours == pytest.approx(alone), "of two classes the scale itself cancels out"
    four = Outcome(np.array([0, 1, 2, 3, 3]), np.array([0, 0, 2, 3, 2]))
    lacking, places = np.array([[1, 0, 1, 1, 2]]), np.array([0, 2, 3, 4, 4])
    ours = find("quadratic_kappa").raw(four, lacking)[0]
    assert ours != pytest.approx(OTHERS["quadratic_kappa"](four.take(places)), abs=1e-3)


@pytest.mark.parametrize(
    ("name", "expected"), [("roc_auc", 0.5), ("pearson", 0.0), ("spearman", 0.0), ("matthews", 0.0)]
)
def test_what_is_undefined_counts_as_guessing(name: str, expected: float) -> None:
    same, score = np.ones(4, dtype=int), np.full(4, 0.7)
    outcome = Outcome(same, same, score, score, score)
    assert find(name).value(outcome) == expected
    assert np.isnan(find(name).raw(outcome, np.ones((1, 4)))[0])
    assert find(name).undefined(outcome)


def test_a_number_s_answer_is_the_better_the_nearer_it_is() -> None:
    outcome = Outcome(np.zeros(2), np.zeros(2), np.array([1.0, 2.0]), np.array([1.5, 0.0]))
    assert find("pearson").goodness(outcome).tolist() == [-0.5, -2.0]
    assert find("accuracy").goodness(outcome).tolist() == [1, 1]


def test_the_default_of_each_kind_of_task() -> None:
    assert {kind.name: fitting({kind})[0] for kind in Of} == {
        "CHOICES": "accuracy",
        "LABELS": "macro_f1",
        "TWO": "f1",
        "VALUES": "pearson",
        "FREE": "exact_match",
        "SEGMENTATION": "miou",
        "SALIENCY": "saliency_miou",
        "EDGES": "edge_f",
        "DEPTH": "depth_rmse",
        "NORMALS": "mean_angle",
    }


def test_the_page_has_each_with_its_kind_and_interval() -> None:
    text = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    said = {
        name: (kind, interval)
        for names, kind, interval in ROW.findall(text)
        for name in re.findall(r"`(\w+)`", names)
    }
    assert said == {
        name: (str(one.of), "Wilson" if one.proportion else "bootstrap")
        for name, one in METRICS.items()
    }


def _ones(o: Outcome, w: np.ndarray) -> np.ndarray:
    return np.ones(len(w))


def test_a_formula_of_the_user_s_is_tried_on_a_few_rows() -> None:
    def unweighted(o: Outcome, w: np.ndarray) -> np.ndarray:
        return np.full(len(w), np.mean(o.gold == o.predicted))

    def misspelt(o: Outcome, w: np.ndarray) -> np.ndarray:
        return w @ o.golden

    def one_number(o: Outcome, w: np.ndarray) -> np.ndarray:
        return np.array([0.5])

    for formula, said in (
        (unweighted, r"'own' is not in weighted form: some rows .* give 0\.\d+, the same rows"),
        (misspelt, r"test_declared\.py:\d+: the metric 'own' fails: AttributeError: .*'golden'"),
        (one_number, r"expected 3 numbers, one a resample, received \[1\]"),
        (lambda o, w: 2 * _ones(o, w), "gave 2, outside of its range 0 to 1"),
    ):
        with pytest.raises(UsageError, match=said):
            metric("own", of=CHOICES)(formula)
        assert "own" not in METRICS


def test_a_declaration_that_cannot_be() -> None:
    with pytest.raises(UsageError, match=r"a metric 'f1' is there already \(.*declared\.py:\d+\)"):
        metric("f1", of=TWO)(_ones)
    with pytest.raises(UsageError, match="reads 'answer', which is unknown; did you mean"):
        metric("own", of=TWO, reads=("answer",))(_ones)
    with pytest.raises(UsageError, match="needs undefined_as: its range has no end"):
        metric("own", of=VALUES, better="lower", range=(0, np.inf))(_ones)


def test_metrics_of_two_directions_have_no_average() -> None:
    metric("loss", of=LABELS, better="lower")(_ones)
    assert (direction(["f1", "accuracy"]), direction(["loss"])) == ("higher", "lower")
    assert find("loss").undefined_as == 1
    with pytest.raises(ValueError, match="higher is better for accuracy and lower for loss"):
        direction(["accuracy", "loss"])
