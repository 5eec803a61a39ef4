"""Which task a row is of: learned, tried on held-out rows, kept, asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.router import (
    CONFIG,
    FOLDER,
    TENSORS,
    Router,
    features,
    learn,
    load_router,
    train_router,
)
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.runs.folder import RunFolder, save_json

COLORS, ANIMALS = ("red", "green", "blue"), ("dog", "cat", "hen")


@pytest.fixture
def routed(opened: Run, tmp_path: Path) -> Run:
    """The run with rows of two of its tasks, whose words differ."""
    words = {"sst2": COLORS, "stsb": ANIMALS}
    tasks = []
    for number, name in enumerate(words):
        folder = tmp_path / name
        folder.mkdir()
        for split in ("train", "test"):
            lines = [
                {"sentence": f"a {w} {n} thing", "sentence1": f"a {w}", "sentence2": f"{w} {n}",
                 "label": n % 2, "score": 1.0}
                for n in range(6) for w in words[name]
            ]  # fmt: skip
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
        (task,) = (one for one in opened.tasks if one.name == name)
        from dataclasses import replace

        tasks.append(replace(task, id=number, source=Source(path=str(folder))))
    save_json(opened.folder.tasks, {"tasks": [task.to_json() for task in tasks]})
    return Run(opened.folder, instead=opened.instead)


def test_it_learns_what_a_convex_solver_finds() -> None:
    """Beside scipy's minimiser of the same loss in float64."""
    optimize = pytest.importorskip("scipy.optimize")
    rows = [torch.stack([features([f"{w} thing"]) for w in some]) for some in (COLORS, ANIMALS)]
    weight = learn(rows)
    used = torch.cat(rows).abs().sum(0) > 0
    x = torch.cat(rows)[:, used].double().numpy()
    y = np.repeat([0, 1], 3)

    def loss(flat: np.ndarray) -> float:
        w = flat.reshape(2, -1)
        z = x @ w.T
        own = z[np.arange(len(y)), y]
        cross = (np.log(np.exp(z).sum(1)) - own) / 3
        return float(cross.sum() / 2 + 1e-3 * (w**2).sum() / weight.numel())

    best = optimize.minimize(loss, np.zeros(2 * x.shape[1])).fun
    assert loss(weight[:, used].double().numpy().ravel()) < best + 0.01


def test_held_out_rows_and_the_run_that_it_belongs_to(routed: Run) -> None:
    found = train_router(routed)
    assert found["rows"] == 36
    assert found["accuracy"] == found["named"] == 1.0
    router = load_router(routed.folder, routed.checkpoint)
    assert router.route({"sst2": ["a blue cup"], "stsb": ["a blue cup"]})[0] == "sst2"
    assert router.route({"sst2": ["hen"], "stsb": ["hen"]})[0] == "stsb"
    assert router.route({"sst2": ["…"], "stsb": ["…"]}) == (None, 0.5)  # no word at all
    strict = Router(router.tasks, router.weight, likely=0.999)
    assert strict.route({"sst2": ["a blue hen"], "stsb": ["a blue hen"]})[0] is None
    assert router.route({}) == (None, 0.0)
    again = train_router(routed, likely=0.7)
    assert again["likely"] == 0.7
    with pytest.raises(UsageError, match="was learned beside another adapter"):
        load_router(routed.folder, "other")
    path = routed.folder.path / FOLDER / TENSORS
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    with pytest.raises(MtlLoraError, match="damaged"):
        load_router(routed.folder, routed.checkpoint)


def test_without_one_it_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="learn one with: mtl-lora router --run"):
        load_router(RunFolder(tmp_path), "x")


def test_predictions_without_a_task(routed: Run) -> None:
    from mtl_lora_cli.evaluation.predict import Predictor

    train_router(routed)
    predictor = Predictor(routed)
    rows: list[dict[str, Any]] = [
        {"sentence": "a red thing"},
        {"sentence1": "a dog", "sentence2": "a cat"},
        {"title": "neither can read it"},
    ]
    one, two, three = predictor.predict(rows, task="auto")
    assert (one["task"], two["task"]) == ("sst2", "stsb")
    assert three == {"task": None, "task_probability": 0.0}
    (alone,) = predictor.predict(rows[:1], task="sst2")
    assert one["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-6)
    assert 0.5 <= one["task_probability"] <= 1
    with pytest.raises(UsageError, match="not both"):
        predictor.predict(rows, task="auto", task_column="x")


def test_features_are_of_length_one_and_know_no_case() -> None:
    assert float(features(["A red dog"]).norm()) == pytest.approx(1)
    assert torch.equal(features(["A RED dog"]), features(["a red dog"]))
    assert not features(["…"]).any()
    assert (CONFIG, FOLDER) == ("router.json", "router")
