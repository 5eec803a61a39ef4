"""The results that a run folder keeps, and what two of them say of two models."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import numpy as np

from mtl_lora_cli.evaluation.metrics import Outcome, mcnemar
from mtl_lora_cli.evaluation.paired import paired
from mtl_lora_cli.runs.folder import RunFolder, read_json, save_json

# Two results on the same examples, asked in the same way.
_ASKED = (
    "task",
    "split",
    "protocol",
    "normalisation",
    "generate",
    "harness_task",
    "limit",
    "rows_fingerprint",
)
# What else is the same where only the adapter makes the difference.
_AROUND = ("template", "prompt_format", "base_model", "dtype", "quantization")
_NAMED = (
    "task",
    "split",
    "protocol",
    "normalisation",
    "harness_task",
    "model",
    "checkpoint",
    "limit",
)
OUTCOME = ("gold", "predicted", "gold_value", "predicted_value", "positive_score")
# What lm-evaluation-harness calls it, and what it is.
_METRIC = {"acc": "accuracy"}


def compare_with_base(folder: RunFolder, result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The untouched base model's stored result on the same rows, see `beside`; None: none yet."""
    for entry in reversed(stored(folder)):
        if entry["model"] == "base" and not _differences(entry, result, (*_ASKED, *_AROUND)):
            return beside(entry, result)
    return None


def compare_with_run(folder: RunFolder, result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Another run's stored result on the same rows, see `beside`; None: it has none yet.

    What that run's adapter stands on may be another: `differs` says what.
    """
    for entry in reversed(stored(folder)):
        if entry["model"] == "adapter" and not _differences(entry, result, _ASKED):
            differs = _differences(entry, result, _AROUND)
            return {"run": folder.name, "differs": differs, **beside(entry, result)}
    return None


def _differences(
    one: Mapping[str, Any], other: Mapping[str, Any], keys: tuple[str, ...]
) -> list[str]:
    return [key for key in keys if one.get(key) != other.get(key)]


def beside(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Another model's result on the same rows.

    Returns:
        Its `metrics`, and `acc` and `acc_norm` under `harness`; what they came from under `outcome`;
        under `paired` for each metric what `ours` is better by
        (`mtl_lora_cli.evaluation.paired.Difference`), null where it is undefined for one of the two;
        McNemar's exact test under `p_value`.
    """
    outcomes = outcome_in(ours), outcome_in(theirs)
    right = [(one.gold == one.predicted).tolist() for one in outcomes]
    return {
        "id": theirs["id"],
        "metrics": theirs["metrics"],
        "harness": theirs.get("harness"),
        "outcome": {name: theirs.get(name) for name in OUTCOME},
        "paired": {
            name: _paired(name, ours, theirs, *outcomes)
            for name in ours["metrics"]
            if name in theirs["metrics"]
        },
        "p_value": mcnemar(*right),
    }


def _paired(
    name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], own: Outcome, other: Outcome
) -> dict[str, Any] | None:
    if any(one["metrics"][name]["value"] is None for one in (ours, theirs)):
        return None
    known = _METRIC.get(name, name)
    if not (own.tells(known) and other.tells(known)):
        return None
    return dataclasses.asdict(paired(known, own, other, ours["task"]))


def outcome_in(result: Mapping[str, Any]) -> Outcome:
    """What a stored result's metrics were computed from."""

    def values(key: str) -> np.ndarray | None:
        return None if result.get(key) is None else np.asarray(result[key], dtype=np.float64)

    return Outcome(
        np.asarray(result["gold"], dtype=np.int64),
        np.asarray(result["predicted"], dtype=np.int64),
        gold_value=values("gold_value"),
        predicted_value=values("predicted_value"),
        positive_score=values("positive_score"),
        positive=result.get("positive", 1),
    )


def stored(folder: RunFolder) -> list[dict[str, Any]]:
    """All results of a run, oldest first."""
    index = folder.evaluations / "index.json"
    if not index.is_file():
        return []
    return [read_json(folder.evaluations / f"{i}.json") for i in read_json(index)["evaluations"]]


def store(folder: RunFolder, result: Mapping[str, Any]) -> str:
    """Add a result to the run folder, and return its id."""
    what = json.dumps([result.get(key) for key in _NAMED])
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{stamp}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"
    folder.evaluations.mkdir(exist_ok=True)
    save_json(folder.evaluations / f"{name}.json", {"id": name, **result})
    index = folder.evaluations / "index.json"
    known = read_json(index)["evaluations"] if index.is_file() else []
    save_json(index, {"evaluations": [*[i for i in known if i != name], name]})
    return name
