"""The results that a run folder keeps, and the base model's beside the adapter's."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from typing import Any

from mtl_lora_cli.evaluation.metrics import mcnemar
from mtl_lora_cli.runs.folder import RunFolder, read_json, save_json

# Two results on the same examples, asked in the same way.
_SAME = (
    "task",
    "split",
    "protocol",
    "normalisation",
    "generate",
    "harness_task",
    "prompt_format",
    "limit",
    "rows_fingerprint",
    "template",
    "base_model",
    "dtype",
    "quantization",
)
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


def compare_with_base(folder: RunFolder, result: dict[str, Any]) -> dict[str, Any] | None:
    """The stored result of the untouched base model on the same rows, with a paired test.

    Returns:
        Its `metrics`, `acc` and `acc_norm` under `harness`, and McNemar's exact test under `p_value`;
        None where there is none yet.
    """
    for entry in reversed(stored(folder)):
        if entry["model"] != "base" or any(entry.get(k) != result.get(k) for k in _SAME):
            continue
        right = [
            [g == p for g, p in zip(r["gold"], r["predicted"], strict=True)]
            for r in (entry, result)
        ]
        return {
            "metrics": entry["metrics"],
            "harness": entry.get("harness"),
            "p_value": mcnemar(*right),
        }
    return None


def stored(folder: RunFolder) -> list[dict[str, Any]]:
    """All results of a run, oldest first."""
    index = folder.evaluations / "index.json"
    if not index.is_file():
        return []
    return [read_json(folder.evaluations / f"{i}.json") for i in read_json(index)["evaluations"]]


def store(folder: RunFolder, result: dict[str, Any]) -> None:
    """Add a result to the run folder."""
    what = json.dumps([result.get(key) for key in _NAMED])
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{stamp}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"
    folder.evaluations.mkdir(exist_ok=True)
    save_json(folder.evaluations / f"{name}.json", {"id": name, **result})
    index = folder.evaluations / "index.json"
    known = read_json(index)["evaluations"] if index.is_file() else []
    save_json(index, {"evaluations": [*[i for i in known if i != name], name]})
