"""The self-test's results, kept: the same model on the same software needs it once."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.own_code import code_fingerprint
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.plain import Way
from mtl_lora_cli.models.side_by_side import Difference
from mtl_lora_cli.models.stand_in import device_of, dtype_of
from mtl_lora_cli.models.trust import Trust, settle
from mtl_lora_cli.runs.atomic import write_json
from mtl_lora_cli.runs.kept import mark_used
from mtl_lora_cli.runs.paths import cache_folder

# Whose code computes: transformers' own layers call some of these as soon as they are installed.
_COMPUTING = (
    *("torch", "transformers", "triton", "bitsandbytes", "kernels"),
    *("mamba-ssm", "causal-conv1d", "flash-linear-attention", "mambapy", "xlstm"),
)


def settled(
    packed: PackedModel, base: BaseModel, *, quantization: str = "none", base_compute: str = "dtype"
) -> Trust:
    """Find the engine and the way that compute the model, or take what was found before.

    Args:
        packed: the model, as it will be used; it is left with that way.
        base: the base model in it.
        quantization, base_compute: as the recipe says.

    Raises:
        UsageError: as `trust.settle`.
    """
    path = cache_folder() / "trust" / f"{_key(packed, base, quantization, base_compute)}.json"
    known = _read(path)
    if known is None:
        known = settle(packed)
        _write(path, known)
    elif known.way is not None:
        was_fused = packed.decoder is not None
        packed.go(known.way)
        if was_fused:
            packed.not_fused = known.tried[0].partition(": ")[2]
    packed.trust = known
    return known


def _key(packed: PackedModel, base: BaseModel, quantization: str, base_compute: str) -> str:
    device = device_of(packed.model)
    parts = {
        "base": base.fingerprint,
        "engine": packed.not_fused if packed.decoder is None else repr(packed.decoder.plan),
        "adapted": None if packed.adapter is None else sorted(packed.adapter.layers),
        "dtype": str(dtype_of(packed.model)),
        "quantization": quantization,
        "base_compute": base_compute,
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        **({} if packed.vision is None else {"vision": packed.vision.settings}),
        "versions": [_version(name) for name in _COMPUTING],
        "code": code_fingerprint(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _read(path: Path) -> Trust | None:
    try:
        kept: dict[str, Any] = json.loads(path.read_text())
        way = kept["way"]
        mark_used(path)
        return Trust(
            way=None if way is None else Way(**way),
            difference=Difference(**kept["difference"]),
            lengths=tuple(kept["lengths"]),
            tried=tuple(kept["tried"]),
            stand_in=tuple(kept["stand_in"]),
            unasked=kept["unasked"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, trust: Trust) -> None:
    """A cache that cannot be written is no reason to stop."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(trust))
