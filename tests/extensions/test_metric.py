"""A metric from one file of the user's: trained by, evaluated, compared and reported, each in its own process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..forks import Ended, Forks

pytestmark = pytest.mark.slow

# Not among ours: it reads all choices' probabilities, is the better the lower, and goes up to 2.
METRIC = '''\
import numpy as np

from mtl_lora_cli.metrics import CHOICES, metric


@metric("brier", of=CHOICES, reads=("probabilities",), better="lower", range=(0, 2), digits=4)
def brier(o, w):
    """Σ_i w_i Σ_k (p_ik − [k = gold_i])² / Σ_i w_i."""
    right = np.arange(o.probabilities.shape[1]) == o.gold[:, None]
    return w @ np.nansum((o.probabilities - right) ** 2, axis=1) / w.sum(1)
'''
TEMPLATE = """\
description: Does a word name a color?
prompt: "{{ word }} is a color?"
label: label
choices: {yes: "yes", no: "no", maybe: "maybe"}
metrics: [brier, accuracy]
"""
RECIPE = """\
extensions: [brier.py]
base_model: MODEL
tasks: [{name: color, template: color.yaml, source: rows}]
training:
  epochs: 100
  max_steps: 6
  learning_rate: 3.0e-2
  row_length: 64
  rows_per_step: 2
  validation: {every: 2, best: color}
run: {name: own}
"""
COLORS, OTHERS = ("red", "blue", "green", "pink", "gold"), ("dog", "cup", "tree", "boat", "king")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, stories_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "brier.py").write_text(METRIC)
    (folder / "color.yaml").write_text(TEMPLATE)
    (folder / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(stories_folder.resolve())))
    (folder / "rows").mkdir()
    words = [(word, "yes") for word in COLORS] + [(word, "no") for word in OTHERS]
    for split in ("train", "validation", "test"):
        rows = [json.dumps({"word": f"{w} {split}", "label": label}) for w, label in words]
        (folder / "rows" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def call(place: Path, warm: Forks) -> Callable[..., Ended]:
    def run(*arguments: str) -> Ended:
        ended = warm.run(*arguments, cwd=place, seconds=300)
        assert ended.returncode == 0, ended.stderr
        return ended

    return run


@pytest.fixture(scope="module")
def results(call: Callable[..., Ended]) -> dict[str, Any]:
    """What `eval --json` says after training, the base model beside it."""
    call("train", "recipe.yaml")
    call("eval", "--task", "all", "--base-only")
    return json.loads(call("eval", "--task", "all", "--json").stdout)


def _stored(place: Path, model: str) -> dict[str, Any]:
    found = [json.loads(p.read_text()) for p in (place / "runs/own/evaluations").glob("2*.json")]
    return next(one for one in found if one["model"] == model)


def _by_row(result: dict[str, Any]) -> np.ndarray:
    """The squared distances of one result's rows, straight from what is stored of them."""
    likely = np.array(result["probabilities"])
    assert likely.shape == (10, 3)
    assert likely.sum(1) == pytest.approx(np.ones(10))
    return ((likely - np.eye(3)[result["gold"]]) ** 2).sum(1)


def test_it_has_its_interval(place: Path, results: dict[str, Any]) -> None:
    """A plain bootstrap: ten rows drawn with repetition, a thousand times."""
    by_row = _by_row(_stored(place, "adapter"))
    measured = results["results"][0]["metrics"]["brier"]
    assert measured["value"] == pytest.approx(by_row.mean(), abs=1e-12)
    draws = np.random.default_rng(0)
    means = [by_row[draws.integers(10, size=10)].mean() for _ in range(1000)]
    expected = np.quantile(means, [0.025, 0.975])
    assert (measured["low"], measured["high"]) == pytest.approx(tuple(expected), abs=1e-12)
    assert measured["low"] < measured["value"] < measured["high"]


def test_the_base_model_is_compared_by_it(place: Path, results: dict[str, Any]) -> None:
    apart = results["results"][0]["base"]["paired"]["brier"]
    differences = _by_row(_stored(place, "adapter")) - _by_row(_stored(place, "base"))
    assert apart["difference"] == pytest.approx(differences.mean(), abs=1e-12)
    draws = np.random.default_rng(1)
    means = [differences[draws.integers(10, size=10)].mean() for _ in range(4000)]
    spread = np.std(means)
    expected = np.quantile(means, [0.025, 0.975])
    assert (apart["low"], apart["high"]) == pytest.approx(tuple(expected), abs=0.3 * spread)
    assert apart["test"] == "bootstrap"


def test_the_best_look_is_that_with_the_least(place: Path, results: dict[str, Any]) -> None:
    events = [json.loads(line) for line in (place / "runs/own/metrics.jsonl").open()]
    looks = {e["step"]: e["metric"]["color"] for e in events if e["event"] == "validation"}
    best = [event for event in events if event["event"] == "best"]
    assert len(looks) == 3
    assert len(set(looks.values())) == 3
    assert best[-1]["value"] == min(looks.values()) == looks[best[-1]["step"]]
    values = [event["value"] for event in best]
    assert values == sorted(values, reverse=True)


def test_tables_and_the_report_have_it(
    place: Path, results: dict[str, Any], call: Callable[..., Ended]
) -> None:
    value = results["results"][0]["metrics"]["brier"]["value"]
    table = call("eval", "--task", "all").stdout
    (line,) = [line for line in table.splitlines() if "brier" in line]
    assert "brier ↓" in line
    assert f" {value:.4f} " in line
    call("report")
    assert "brier ↓" in (place / "runs/own/report.html").read_text(encoding="utf-8")


def test_without_its_file_the_run_says_where_it_was(
    place: Path, results: dict[str, Any], warm: Forks
) -> None:
    (place / "brier.py").rename(place / "away.py")
    try:
        ended = warm.run("eval", "--task", "all", cwd=place)
    finally:
        (place / "away.py").rename(place / "brier.py")
    recipe = "runs/own/recipe.yaml"
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: {recipe}:")
    assert line.endswith(f": extensions.0: no such file {place}/brier.py")


def test_a_metric_that_cannot_be_is_told_before_the_model_is_loaded(
    place: Path, warm: Forks
) -> None:
    for change, said in (
        (("w @", "np.ones(len(w)) *"), "the metric 'brier' fails: ValueError: "),
        (("o.gold[", "o.golden["), "the metric 'brier' fails: AttributeError: "),
        (("range=(0, 2)", "range=(0, 0.1)"), "the metric 'brier' gave "),
        (
            ('"lower"', '"less"'),
            "the metric 'brier': better is 'higher' or 'lower', received 'less'",
        ),
        (('"brier"', '"accuracy"'), "a metric 'accuracy' is there already ("),
    ):
        (place / "broken.py").write_text(METRIC.replace(*change))
        ended = warm.run("train", "recipe.yaml", "extensions=[broken.py]", "--dry-run", cwd=place)
        assert (ended.returncode, ended.stdout) == (2, "")
        (line,) = ended.stderr.splitlines()
        assert line.startswith(f"error: {place}/broken.py:"), line
        assert said in line, line


def test_two_directions_have_no_average(place: Path, warm: Forks) -> None:
    """Neither the best look, nor a table's average, nor a comparison as a whole."""
    (place / "share.yaml").write_text(TEMPLATE.replace("[brier, accuracy]", "[accuracy]"))
    recipe = (place / "recipe.yaml").read_text()
    recipe = recipe.replace("}]", "}, {name: share, template: share.yaml, source: rows}]", 1)
    recipe = recipe.replace("best: color", "best: macro").replace("name: own", "name: two")
    (place / "two.yaml").write_text(recipe)
    why = "higher is better for accuracy and lower for brier: their average says nothing"
    ended = warm.run("train", "two.yaml", "--dry-run", cwd=place)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        f"error: two.yaml:10: training.validation.best: {why}; name a task"
    )
    ended = warm.run("compare", "two.yaml", "--output", "none", cwd=place)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].endswith(f"cannot be compared as a whole: {why}")
    assert not (place / "none").exists()
    changed = ("training.validation.best=share", "training.max_steps=2")
    assert warm.run("train", "two.yaml", *changed, cwd=place, seconds=300).returncode == 0
    ended = warm.run("eval", "--run", "two", "--task", "all", cwd=place, seconds=300)
    assert ended.returncode == 0, ended.stderr
    assert f"all tasks: undefined, {why}" in ended.stdout
