"""The results that a run folder keeps, and what two of them say of two models."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.metrics import METRICS, Outcome
from mtl_lora_cli.metrics.intervals import mcnemar
from mtl_lora_cli.metrics.outcome import OF_EACH_ROW
from mtl_lora_cli.metrics.paired import paired
from mtl_lora_cli.recipe.names import NAME
from mtl_lora_cli.runs.folder import RunFolder, read_json, save_json
from mtl_lora_cli.runs.listing import digest_of, read_digests
from mtl_lora_cli.runs.lock import in_turn
from mtl_lora_cli.runs.paths import require_writable

# Two results on the same examples, asked in the same way.
_ASKED = (
    "task",
    "split",
    "protocol",
    "normalisation",
    "generate",
    "sampling",
    "harness_task",
    "limit",
    "blind",
    "rows_fingerprint",
    "ends_counted",  # older results have none, and counted none
    "positive",
)
# What else is the same where only the adapter makes the difference.
_AROUND = (
    "template",
    "conversation",
    "prompt_format",
    "chat",
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
    "source",
    "blind",
)
OUTCOME = OF_EACH_ROW  # keys of what stands for each row; those that no metric reads may be missing
# What lm-evaluation-harness calls it, and what it is.
_METRIC = {"acc": "accuracy"}


def compare_with_base(
    folder: RunFolder,
    result: Mapping[str, Any],
    known: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any] | None:
    """The untouched base model's stored result on the same rows, see `beside`; None: none yet.

    Where rows were answered several times, none: what is stored of each row is its first answer. `known` are
    the run's results, where they have been read.
    """
    if result.get("pass_at"):
        return None
    for entry in reversed(stored(folder) if known is None else known):
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
    named = {*one["metrics"], *other["metrics"]}
    if not any(METRICS[name].of_positive for name in named if name in METRICS):
        keys = tuple(key for key in keys if key != "positive")
    return [key for key in keys if (one.get(key) or None) != (other.get(key) or None)]


def beside(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Another model's result on the same rows.

    Returns:
        Its `metrics`, and `acc` and `acc_norm` under `harness`; what they came from under `outcome`;
        under `paired` for each metric what `ours` is better by
        (`mtl_lora_cli.metrics.paired.PairedDifference`), null where it is undefined for one of the two;
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


def title_in(result: Mapping[str, Any], metric: str) -> str:
    """A metric as tables show it, `f1 (yes)`; older results do not say which class it is of."""
    return str((result.get("titles") or {}).get(metric, metric))


def theirs_in(result: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The other model's result on the same rows, from what `beside` says of it."""
    return {**result, "metrics": other["metrics"], **other["outcome"]}


def _paired(
    name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], own: Outcome, other: Outcome
) -> dict[str, Any] | None:
    if any(one["metrics"][name]["value"] is None for one in (ours, theirs)):
        return None
    known = _METRIC.get(name, name)
    if known not in METRICS or not all(METRICS[known].known(one) for one in (own, other)):
        return None
    return dataclasses.asdict(paired(known, own, other, ours["task"]))


def outcome_in(result: Mapping[str, Any]) -> Outcome:
    """What a stored result's metrics were computed from."""

    kinds = {"gold": np.int64, "predicted": np.int64, "references": np.str_, "answers": np.str_}
    of_each: dict[str, np.ndarray] = {
        name: unpack(result[name])
        if name == "tallies"
        else np.asarray(result[name], dtype=kinds.get(name, np.float64))
        for name in OUTCOME
        if result.get(name) is not None
    }
    return Outcome(**of_each, positive=result.get("positive", 1))


def pack(values: np.ndarray) -> dict[str, Any]:
    """Many numbers as JSON keeps them: float64 [E, K], deflated, in base 64."""
    whole = np.ascontiguousarray(values, dtype="<f8")
    text = base64.b64encode(zlib.compress(whole.tobytes(), 6)).decode()
    return {"shape": list(values.shape), "deflated": text}


def unpack(packed: Mapping[str, Any]) -> np.ndarray:
    """The inverse of `pack`.

    Raises:
        MtlLoraError: it is damaged.
    """
    try:
        raw = zlib.decompress(base64.b64decode(packed["deflated"]))
        return np.frombuffer(raw, dtype="<f8").reshape(packed["shape"])
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise MtlLoraError(f"a result's tallies are damaged: {error}") from None


def stored(folder: RunFolder) -> list[dict[str, Any]]:
    """All results of a run, oldest first.

    Raises:
        MtlLoraError: one of the files is damaged.
    """
    return [_read(folder.evaluations / f"{name}.json") for name in _index(folder)]


def _index(folder: RunFolder) -> list[str]:
    """Ids of the results of a run, oldest first."""
    path = folder.evaluations / "index.json"
    if not path.is_file():
        return []
    names = read_json(path).get("evaluations")
    if not isinstance(names, list) or not all(
        isinstance(name, str) and NAME.fullmatch(name) for name in names
    ):
        raise MtlLoraError(f"{path}: damaged: 'evaluations' is no list of ids")
    return names


_FORMS: dict[str, type] = {
    "id": str,
    "task": str,
    "model": str,
    "metrics": dict,
    "gold": list,
    "predicted": list,
}


def _read(path: Path) -> dict[str, Any]:
    result = read_json(path)
    for key, kind in _FORMS.items():
        if not isinstance(result.get(key), kind):
            raise MtlLoraError(f"{path}: damaged: {key}: received {result.get(key)!r:.60}")
    return result


def require_storable(folder: RunFolder) -> None:
    """Refuse to score what the run folder would not keep.

    Raises:
        UsageError: the run folder cannot be written.
    """
    require_writable(folder.evaluations, f"run '{folder.name}'")


def store(folder: RunFolder, result: Mapping[str, Any]) -> str:
    """Add a result to the run folder, and return its id."""
    what = json.dumps([result.get(key) for key in _NAMED])
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{stamp}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"
    folder.evaluations.mkdir(exist_ok=True)
    save_json(folder.evaluations / f"{name}.json", {"id": name, **result})
    with in_turn(folder.evaluations):  # tasks of one run may be scored by several processes at once
        known = [other for other in _index(folder) if other != name]
        digests = {**read_digests(folder), name: digest_of(result)}
        content = {"evaluations": [*known, name], "digests": digests}
        save_json(folder.evaluations / "index.json", content)
    return name
