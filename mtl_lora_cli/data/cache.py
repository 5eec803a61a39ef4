"""Encoded tasks kept on disk, under a key made of everything that determines them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mtl_lora_cli.data.audit import Audit
from mtl_lora_cli.data.encoded import EncodedSplit
from mtl_lora_cli.pictures.shown import Picture
from mtl_lora_cli.runs import kept
from mtl_lora_cli.runs.paths import ANOTHER_CACHE, cache_folder
from mtl_lora_cli.visible import tell

FORMAT = 4  # raise it when encoding or auditing gives another result than before

Traces = dict[str, np.ndarray]  # of each split, see traces.py
_TRACES = "traces."


def key_of(**parts: Any) -> str:
    """A key for everything that determines an encoding: template text, fingerprints, lengths, …"""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load(key: str) -> tuple[EncodedSplit, Audit, Traces] | None:
    """What was stored under the key; None where there is nothing, or nothing readable."""
    path = _path(key)
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["about"])
            encoded = EncodedSplit(
                tokens=file.get_tensor("tokens"),
                starts=file.get_tensor("starts"),
                prompt_lengths=file.get_tensor("prompt_lengths"),
                mask=file.get_tensor("mask") if "mask" in file.keys() else None,  # noqa: SIM118
                pictures=_pictures(about.get("pictures")),
                picture_token=about.get("picture_token"),
                **about["counts"],
            )
            known = [name for name in file.keys() if name.startswith(_TRACES)]  # noqa: SIM118
            traces = {name.removeprefix(_TRACES): file.get_tensor(name) for name in known}
        kept.mark_used(path)
        return encoded, Audit.from_json(about["audit"]), traces
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
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
    tensors = {name: getattr(encoded, name) for name in ("tokens", "starts", "prompt_lengths")}
    if encoded.mask is not None:
        tensors["mask"] = encoded.mask
    tensors |= {f"{_TRACES}{split}": numbers for split, numbers in traces.items()}
    path = _path(key)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        save_file(tensors, temporary, metadata={"about": about})
        Path(temporary).replace(path)
    except (OSError, SafetensorError) as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        _tell_once(str(path.parent), getattr(error, "strerror", None) or str(error))
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
def _tell_once(folder: str, why: str) -> None:
    tell(f"note: {folder} cannot be written ({why}): encoded data are not kept; {ANOTHER_CACHE}")


def _path(key: str) -> Path:
    return cache_folder() / "encoded" / f"{key}.safetensors"
