"""The examples, the audit and the stream of a recipe are those that runs before this one had.

A run that was begun by an earlier version goes on with the same rows: so digests of all that a step is made of
are kept here as figures, made by the version before rows were read in pieces. Whoever changes one of them on
purpose raises `cache.FORMAT`, and says why in the changelog.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.data.bind import bind_tasks
from mtl_lora_cli.data.dynamic import DynamicMixture
from mtl_lora_cli.data.mixture import Mixture
from mtl_lora_cli.data.prepare import TrainingData, prepare_training
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_tokenizer
from mtl_lora_cli.recipe.load import load_recipe

SAMPLES = """tasks:
- {name: animals, template: samples/animals, repeat: 2}
- {name: uses, template: samples/uses, max_examples: 31, sampling_weight: 3}
- {name: search_ads, template: samples/search_ads}
"""
OWN = """tasks:
- {name: boolq, template: llm_adapters, source: {path: DATA/commonsense/boolq}}
- {name: cola, template: cola, source: {path: DATA/glue/cola}}
- {name: rte, template: rte, source: {path: DATA/glue/rte}}
"""
TEXTS = """tasks:
- {name: texts, template: instruct/completion, source: {path: texts.jsonl}}
- {name: animals, template: samples/animals}
"""
RECIPES = {
    "samples": (SAMPLES, "training: {row_length: 128, epochs: 2.5, rows_per_step: 3}"),
    "tempered": (
        SAMPLES,
        "mixing: {temperature: 3}\ntraining: {row_length: 90, rows: one_task, epochs: 2, seed: 4, "
        "on_overflow: drop, rows_per_step: 2}",
    ),
    "weighted": (SAMPLES, "mixing: weights\ntraining: {row_length: 200, epochs: 3}"),
    "staged": (
        SAMPLES,
        "training: {row_length: 128, rows_per_step: 2, stages: [{tasks: [animals], epochs: 1.5}, "
        "{tasks: [animals, uses, search_ads]}]}",
    ),
    "dynamic": (
        SAMPLES,
        "mixing: {dynamic: progress, every: 5}\ntraining: {row_length: 128, epochs: 1, rows_per_step: 2}",
    ),
    "own": (OWN, "training: {row_length: 150, epochs: 2, on_overflow: truncate_prompt}"),
    "texts": (TEXTS, "training: {row_length: 40, epochs: 1.2, on_overflow: drop}"),
}
FIGURES = {
    "samples": "bef5b44c3bd12a42 286678bc4eb2e6fe",
    "tempered": "63dfd119ec88ff1a 0e1496c514ba9e2f",
    "weighted": "bef5b44c3bd12a42 c87c79c550382fa6",
    "staged": "bef5b44c3bd12a42 89dbd9ee2e81d553",
    "dynamic": "bef5b44c3bd12a42 0d9c5c7669931c55",
    "own": "e6d1f3889fba1a16 6f47f55f62d5f35c",
    "texts": "5fff2bb368ef1926 6efbc4f7cf292e6b",
}


def stream(mixture: Mixture, steps: int) -> str:
    """A digest of every step's epoch and rows."""
    found = hashlib.sha256(f"{steps} {mixture.planned_counts()}".encode())
    for number in range(steps):
        if isinstance(mixture, DynamicMixture) and number and number % mixture.every == 0:
            count = len(mixture.names)
            wanted = [2.0 * (1 + (number + t) % count) / count / (count + 1) for t in range(count)]
            mixture.decide(number // mixture.every, wanted)
        epoch, rows = mixture.step(number)
        found.update(json.dumps([epoch, [[list(p) for p in row] for row in rows]]).encode())
    return found.hexdigest()[:16]


def examples(data: TrainingData) -> str:
    """A digest of tokens, of what of them is learned, and of what was noticed."""
    found = hashlib.sha256()
    for split, noticed in zip(data.splits, data.audits, strict=True):
        for number in range(len(split)):
            tokens, learned = split.example(number), split.learned(number)
            found.update(json.dumps([tokens.tolist(), learned.tolist()]).encode())
        counts = (split.rows, split.dropped, split.truncated, split.turns, split.supervised)
        found.update(f"{counts} {split.learned_counts().tolist()}".encode())
        told = json.dumps(as_then(noticed.to_json()), sort_keys=True)
        found.update(re.sub(r'/[^ "]*/', "", told).encode())  # wherever the rows lie
    return found.hexdigest()[:16]


def as_then(audit: dict[str, Any]) -> dict[str, Any]:
    """An audit without what is looked at since."""
    since = ("odd", "only", "unlearned")
    blank = [one for one in audit["odd"] if one.pop("kind") == "blank"]
    return {key: value for key, value in audit.items() if key not in since} | {"blank": blank}


def texts(folder: Path) -> None:
    """Plain texts, some of them without a part that is learned, twice there, or too long."""
    rows = [
        {"text": f"Once upon a time there were {n} bears."} if n % 3 else
        {"prompt": f"How many bears? {'Many. ' * (n % 14)}", "completion": f" {n // 6} bears."}
        for n in range(60)
    ]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "texts.jsonl").write_text(lines, encoding="utf-8")


def digests(name: str, folder: Path, model: Path, rows: Path) -> str:
    tasks, keys = RECIPES[name]
    texts(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"base_model: {model}\n{tasks}{keys}\n".replace("DATA", str(rows)), "utf-8")
    loaded = load_recipe(recipe)
    tokenizer = load_tokenizer(find_base_model(str(model)))
    data = prepare_training(bind_tasks(loaded), loaded.recipe, tokenizer, 512)
    training = loaded.recipe.training
    steps = data.mixture.steps_in(training.epochs, training.max_steps)
    return f"{examples(data)} {stream(data.mixture, steps)}"


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.long] * (n in ("samples", "weighted"))) for n in RECIPES],
)
def test_examples_audit_and_stream_are_those_of_before(
    name: str,
    tmp_path: Path,
    small_model: Path,
    data_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    first = digests(name, tmp_path, small_model, data_folder)
    assert first == FIGURES[name]
    assert digests(name, tmp_path, small_model, data_folder) == first  # from the cache
