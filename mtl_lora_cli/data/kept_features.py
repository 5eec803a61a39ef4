"""What a frozen tower makes of pictures, kept on disk: it runs once a picture, whoever asks.

An entry of the cache belongs to one tower: its weights, how it is shown pictures, and the dtype. In it lie files of
features, each picture under the hash of its bytes. Where a module between tower and language part learns, what the tower
itself gives is kept; otherwise what takes the places of tokens, deeper levels among it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mtl_lora_cli.engine.memory import GIB
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.machine.processes import Processes
from mtl_lora_cli.models.load import beside_of
from mtl_lora_cli.models.sight import tower_dtype
from mtl_lora_cli.models.vision import KEPT, WHOLLY_KEPT, Seen, Vision, around, features
from mtl_lora_cli.runs.atomic import write_bytes
from mtl_lora_cli.runs.kept import claimed, mark_used
from mtl_lora_cli.runs.paths import cache_folder, existing, require_cache
from mtl_lora_cli.visible import tell

if TYPE_CHECKING:
    from mtl_lora_cli.adapters.inject import Adapter
    from mtl_lora_cli.data.pictured import Eyes
    from mtl_lora_cli.pictures.shown import Picture

_OF_NO_PICTURE = {
    "text_config",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "_attn_implementation",
}
KIND = "features"  # of cache entries
MOST = 10 * GIB  # bytes that are kept without being asked to
_FILE = 2**28  # bytes of features in one file
_TOGETHER = 16  # pictures that the tower sees at once


class KeptFeatures:
    """Features in one folder.

    Args:
        folder: of the tower; it need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, tuple[Path, list[str]]] = {}
        self._files: dict[Path, Any] = {}
        self.look_again()

    def look_again(self) -> None:
        """Find what was written since."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._files:
                continue
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError):  # cut off, or gone just now: it is made again
                continue
            self._files[path] = file
            for name in file.keys():  # noqa: SIM118 - a file is no mapping
                key, _, part = name.rpartition("/")
                self._places.setdefault(key, (path, []))[1].append(part)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def read(self, key: str) -> Seen:
        """What is kept of one picture."""
        path, parts = self._places[key]
        return {part: self._files[path].get_tensor(f"{key}/{part}") for part in parts}

    def write(self, found: Mapping[str, Seen]) -> None:
        """One more file, whole or not at all.

        Raises:
            UsageError: the cache cannot be written.
        """
        flat = {
            f"{key}/{part}": value.contiguous()
            for key, seen in found.items()
            for part, value in seen.items()
        }
        name = hashlib.sha256("".join(found).encode()).hexdigest()[:16]
        require_cache(self.folder)
        try:
            write_bytes(self.folder / f"{name}.safetensors", save(flat))
        except OSError as error:
            raise UsageError(
                f"{self.folder} cannot be written: {error.strerror}; images.features: run keeps nothing"
            ) from None

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))


@dataclass(frozen=True)
class Tower:
    """What is between a picture's pixels and what is kept of it.

    Attributes:
        model: transformers' own.
        vision: how it reads pictures.
        learns: a module behind the tower learns; what the tower itself gives is kept.
    """

    model: Any
    vision: Vision
    learns: bool

    @torch.no_grad()
    def see(self, many: Sequence[Seen], counts: Sequence[int]) -> list[Seen]:
        """What is kept of each of several pictures, on the CPU."""
        device = self.model.get_input_embeddings().weight.device
        joined = {name: value.to(device) for name, value in self.vision.join(many).items()}
        dtype = tower_dtype(self.model)
        wide = {n: v.to(dtype) if v.is_floating_point() else v for n, v in joined.items()}
        if self.learns:
            levels = self.vision.towered(around(self.model), wide)
            named = {f"{KEPT}.{number}": level for number, level in enumerate(levels)}
            leading = [_leading(one) for one in many]
            counts = leading if sum(leading) == len(levels[0]) else counts
        else:
            found = features(self.model, wide, dtype)
            named = {f"{KEPT}.{number}": level for number, level in enumerate(found.deeper)}
            named[WHOLLY_KEPT] = found.tokens
        parts = {name: level.to("cpu", dtype).split(list(counts)) for name, level in named.items()}
        return [
            {name: part[number].clone() for name, part in parts.items()}
            | {name: one[name].clone() for name in self.vision.beside}
            for number, one in enumerate(many)
        ]

    @property
    def folder(self) -> Path:
        """Of the cache, by all that decides what is kept. A tower that stays as it is is hashed once."""
        named = self._state()
        config = json.dumps(
            _without_text(around(self.model).config.to_dict()), sort_keys=True, default=str
        )
        about = f"{self.vision.settings} {tower_dtype(self.model)} {config}"
        state = tuple(
            (one.data_ptr(), one._version) for own in named.values() for one in own.values()
        )
        known = _DIGESTS.setdefault(self.model, {})
        if (about, state) not in known:
            known[about, state] = self._digest(about, named)
        return cache_folder() / KIND / known[about, state]

    def _state(self) -> dict[str, Mapping[str, Tensor]]:
        """The weights that decide it, by the paths of their modules."""
        kept = None if not self.learns else self.vision.connector
        parts = [path for path in beside_of(self.model) if kept is None or not path.endswith(kept)]
        named = {path: self.model.get_submodule(path).state_dict() for path in parts}
        named[""] = dict(around(self.model).named_parameters(recurse=False))
        return named

    @staticmethod
    def _digest(about: str, named: Mapping[str, Mapping[str, Tensor]]) -> str:
        digest = hashlib.sha256(about.encode())
        for path, values in named.items():
            for name, value in values.items():
                digest.update(f"{path}.{name} {list(value.shape)} {value.dtype}".encode())
                raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(raw.numpy().data)
        return digest.hexdigest()[:32]


_DIGESTS: WeakKeyDictionary[Any, dict[Any, str]] = WeakKeyDictionary()  # by transformers' models


def _without_text(config: Any) -> Any:
    """What a configuration says of pictures: which of the tower's levels are given on, and how."""
    if not isinstance(config, dict):
        return config if isinstance(config, str | int | float | list) else str(config)
    return {k: _without_text(v) for k, v in config.items() if k not in _OF_NO_PICTURE}


def _leading(seen: Seen) -> int:
    """How many of a picture's parts the tower sees."""
    return len(seen["pixel_values"])


def why_not(vision: Vision, adapter: Adapter | None, model: Any) -> str | None:
    """Why a tower's features cannot be kept; None: they can.

    Args:
        vision: how the model reads pictures.
        adapter: what learns.
        model: transformers' own.
    """
    if adapter is None:
        return None
    beside = beside_of(model)
    adapted = next(
        (path for path in adapter.layers if any(path.startswith(f"{one}.") for one in beside)), None
    )
    if adapted is not None:
        return f"an adapter learns in the tower ({adapted})"
    connector = vision.connector
    known = tuple(f"{one}." for one in beside if connector is not None and one.endswith(connector))
    learned = next((name for name in adapter.whole if not name.startswith(known)), None)
    if learned is not None:
        return f"{learned} learns, and stands within the tower"
    return None


def keep_features(
    model: Any,
    adapter: Adapter | None,
    eyes: Eyes,
    pictures: Sequence[Picture],
    how: str,
    processes: Processes,
) -> None:
    """Let the tower see each picture once, and have it seen no more: `eyes` read what was kept.

    Args:
        model: transformers' own; its tower learns nothing.
        adapter: what learns in it.
        eyes: of the model.
        pictures: that will be asked for.
        how: `images.features`: `auto` keeps up to 10 GiB, `keep` any number, `run` nothing.
        processes: the first one of each host runs the tower.

    Raises:
        UsageError: `keep` is asked for, and something of the tower learns, or the disk does not suffice.
    """
    if how == "run" or not pictures:
        return
    reason = why_not(eyes.vision, adapter, model)
    if reason is not None:
        if how == "keep":
            raise UsageError(f"images.features: keep: {reason}; use run")
        return
    tower = Tower(model, eyes.vision, bool(adapter is not None and adapter.whole))
    store = KeptFeatures(tower.folder)
    with processes.one_after_another():
        kept = _made(tower, store, eyes, pictures, how)
    if kept:
        store.look_again()
        mark_used(store.folder)
        eyes.store = store


def _made(
    tower: Tower, store: KeptFeatures, eyes: Eyes, pictures: Sequence[Picture], how: str
) -> bool:
    """Whether all is kept now."""
    if not _missing(store, eyes, pictures):
        return True
    waiting = lambda: tell("another process keeps features of the same tower: waiting")  # noqa: E731
    with claimed(store.folder, waiting):
        store.look_again()
        missing = _missing(store, eyes, pictures)
        if not missing:
            return True
        each = tower.see(eyes.looked(missing[:1]), eyes.counts(missing[:1]))[0]
        if not _room(each, missing, eyes, store, how):
            return False
        began = time.monotonic()
        for some in _filled(tower, eyes, missing):
            try:
                store.write(some)
            except UsageError as error:
                if how == "keep":
                    raise
                tell(f"note: features are not kept: {error}; the tower runs each step")
                return False
        tell(f"features: {time.monotonic() - began:.1f} s, {_size(store.bytes)} in {store.folder}")
    return True


def _missing(store: KeptFeatures, eyes: Eyes, pictures: Sequence[Picture]) -> list[Picture]:
    found = {eyes.key(one): one for one in pictures}
    return [one for key, one in found.items() if key not in store]


def _room(
    each: Seen, missing: Sequence[Picture], eyes: Eyes, store: KeptFeatures, how: str
) -> bool:
    """Whether there is room for all; what it takes is said before it is made.

    Raises:
        UsageError: there is none, and all were to be kept.
    """
    counts = eyes.counts(missing)
    needed = sum(v.nbytes for v in each.values()) * sum(counts) // max(1, counts[0])
    free = shutil.disk_usage(existing(store.folder)).free
    dtype = str(next(v.dtype for n, v in each.items() if n.startswith(KEPT)))
    what = f"{len(missing):,} pictures in {dtype.removeprefix('torch.')}: {_size(needed)}"
    if needed > free * 0.9:
        if how == "keep":
            raise UsageError(
                f"images.features: keep: {what}, and {_size(free)} are free at {store.folder}"
            )
        tell(
            f"note: features are not kept: {what}, {_size(free)} are free; the tower runs each step"
        )
        return False
    if how == "auto" and needed > MOST:
        tell(
            f"note: features are not kept: {what}, more than {_size(MOST)}; images.features: keep keeps them"
        )
        return False
    tell(f"keeping features of {what} (once)")
    return True


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:.1f} MiB"


def _filled(tower: Tower, eyes: Eyes, missing: Sequence[Picture]) -> Iterator[dict[str, Seen]]:
    """Files of features."""
    current: dict[str, Seen] = {}
    size = 0
    for start in range(0, len(missing), _TOGETHER):
        some = missing[start : start + _TOGETHER]
        looked = eyes.looked(some)
        for picture, seen in zip(some, tower.see(looked, eyes.counts(some)), strict=True):
            current[eyes.key(picture)] = seen
            size += sum(value.nbytes for value in seen.values())
        if size >= _FILE:
            yield current
            current, size = {}, 0
    if current:
        yield current
