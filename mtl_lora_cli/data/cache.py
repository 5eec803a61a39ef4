"""Encoded tasks kept on disk, under a key made of everything that determines them."""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mtl_lora_cli.data import parts
from mtl_lora_cli.data.audit import Audit
from mtl_lora_cli.data.encoded import EncodedSplit
from mtl_lora_cli.pictures.shown import Picture
from mtl_lora_cli.runs import kept
from mtl_lora_cli.runs.paths import ANOTHER_CACHE, cache_folder
from mtl_lora_cli.visible import tell

FORMAT = (
    6  # raise it when encoding or auditing gives another result than before, or is kept otherwise
)


@dataclass(frozen=True)
class Traces:
    """Rows as they are known again, see traces.py.

    Attributes:
        train: both columns of the training rows' numbers, each sorted, every number once, without 0.
        held: of each held-out split uint64 [rows, 2].
    """

    train: tuple[np.ndarray, np.ndarray]
    held: dict[str, np.ndarray]


Stored = tuple[EncodedSplit, Audit, Traces]
_TRACES = "traces."


def key_of(**parts: Any) -> str:
    """A key for everything that determines an encoding: template text, fingerprints, lengths, …"""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load(key: str) -> Stored | None:
    """What was stored under the key; None where there is nothing, or nothing readable.

    Large arrays are maps of the file: all processes of a host that load the same share its pages.
    """
    path = _path(key)
    try:
        text, arrays = parts.read(path)
        about = json.loads(text)
        encoded = EncodedSplit(
            tokens=arrays["tokens"],
            starts=arrays["starts"],
            prompt_lengths=arrays["prompt_lengths"],
            mask=arrays.get("mask"),
            pictures=_pictures(about.get("pictures")),
            picture_token=about.get("picture_token"),
            **about["counts"],
        )
        held = {
            name.removeprefix(_TRACES): values
            for name, values in arrays.items()
            if name.startswith(_TRACES)
        }
        train = (held.pop("train.0"), held.pop("train.1"))
        kept.mark_used(path)
        return encoded, Audit.from_json(about["audit"]), Traces(train, held)
    except (OSError, KeyError, TypeError, ValueError):
        return None


def claimed(key: str, task: str) -> AbstractContextManager[None]:
    """Only one process encodes what belongs under the key; who waited looks for it again, see `kept.claimed`."""

    def waiting() -> None:
        tell(f"task '{task}': another process is encoding it; waiting for that")

    kept.limit()  # a fault in it is said before the work
    return kept.claimed(_path(key), waiting)


def store(key: str, encoded: EncodedSplit, audit: Audit, traces: Traces) -> None:
    """Keep an encoding; a cache that cannot be written is no reason to stop."""
    counts = {name: getattr(encoded, name) for name in ("dropped", "truncated", "rows", "turns")}
    shown = {} if encoded.pictures is None else _shown(encoded)
    about = json.dumps({"counts": counts, "audit": audit.to_json(), **shown})
    arrays = {name: getattr(encoded, name) for name in ("tokens", "starts", "prompt_lengths")}
    if encoded.mask is not None:
        arrays["mask"] = encoded.mask
    arrays |= {f"{_TRACES}train.{n}": numbers for n, numbers in enumerate(traces.train)}
    arrays |= {f"{_TRACES}{split}": numbers for split, numbers in traces.held.items()}
    path = _path(key)
    try:
        parts.write(path, arrays, about)
    except OSError as error:
        _tell_once(str(path.parent), error.strerror or str(error))
        return
    left = kept.keep_to_limit()
    if left:
        tell(
            f"note: {len(left)} encoded task(s) that were not used for longest left the cache "
            f"({sum(one.bytes for one in left) / 2**20:.1f} MiB); {kept.LIMIT} says how much it keeps"
        )


def _shown(encoded: EncodedSplit) -> dict[str, Any]:
    assert encoded.pictures is not None
    pictures = [[one.to_json() for one in some] for some in encoded.pictures]
    return {"pictures": pictures, "picture_token": encoded.picture_token}


def _pictures(content: Any) -> tuple[tuple[Picture, ...], ...] | None:
    if content is None:
        return None
    return tuple(tuple(map(Picture.from_json, some)) for some in content)


@cache
def _tell_once(where: str, why: str) -> None:
    tell(f"note: {where} cannot be written ({why}): encoded data are not kept; {ANOTHER_CACHE}")


def folder() -> Path:
    """Where encoded data are kept."""
    return cache_folder() / "encoded"


def _path(key: str) -> Path:
    return folder() / f"{key}.safetensors"
