"""Folding one task's adapter into the base weights, shard by shard and a few rows at a time.

W' = W + s · B'_t A', computed in float32 (float64 where the file stores that) and cast once to the dtype
that the file stores; or Ŵ + s · B'_t A' on the weights that a quantised run saw (`quantised.py`), cast to that
run's dtype. A file in which nothing changes is not written again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mtl_lora_cli.adapters.experts import MultiTaskStack
from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.errors import CheckError, UsageError
from mtl_lora_cli.export.quantised import Quantised
from mtl_lora_cli.export.shards import (
    FLOATS,
    Planned,
    Shard,
    Stored,
    as_bytes,
    read_shard,
    write_shards,
)
from mtl_lora_cli.export.weight_names import (
    WeightNames,
    require_meant,
    same_names,
    weight_names,
)
from mtl_lora_cli.machine.cores import cores
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.files import CONFIG, INDEX, weight_files
from mtl_lora_cli.models.prequantised import method_of
from mtl_lora_cli.runs.atomic import begin_sync, write_text

# Weights in other formats, which would be the base model's, and the base model's own card.
NOT_COPIED = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".safetensors"}

# What is no float and no part of a quantised weight: places, masks.
_NUMBERS = ("I64", "BOOL")
_THREADS = 8  # each has some blocks in memory
_SCALES = ".absmax"  # what bitsandbytes stores beside a weight of 4 bits
_AGAIN = (
    "a sum would have to be quantised again, which is not merging; export --format peft leaves the base "
    "model as it is"
)

# A' [k, in], B'_t [out, k], s; of a stack of experts A' [E, k, columns] and B'_t [E, rows, k], as it is stored.
Update = tuple[Tensor, Tensor, float]


def task_updates(adapter: Adapter, task: int) -> dict[str, Update]:
    """The task's ordinary LoRA for every adapted weight, under the weight's name, on the CPU."""
    updates = {}
    with one_thread():
        for path, layer in adapter.layers.items():
            down, up = layer.task_update(task)
            if isinstance(layer, MultiTaskStack) and layer.frozen.transposed:
                down, up = up.mT, down.mT
            updates[layer.weight_name(path)] = (
                down.float().cpu(),
                up.float().cpu(),
                adapter.config.scale(layer.rank),
            )
    return updates


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes in one thread: hundreds of small products wait longer for others than they take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def directions(adapter: Adapter) -> tuple[dict[str, Update], dict[str, Tensor]]:
    """Of a method that scales rows (`Settings.scales_rows`): A and B of V, and m [out], by the weights' names."""
    updates, lengths = {}, {}
    for path, layer in adapter.layers.items():
        down, up = layer.direction()
        weight = layer.weight_name(path)
        updates[weight] = (down.float().cpu(), up.float().cpu(), adapter.config.scale(layer.rank))
        lengths[weight] = cast(Tensor, layer.magnitude).detach().float().cpu()
    return updates, lengths


@dataclass(frozen=True)
class MergePlan:
    """What a merged folder will hold.

    Attributes:
        shards: weights files of which something changes.
        kept: weights files that stay as they are.
        copied: the other files.
        texts: small files that are written anew: name → content.
        changing: tensors that the updates must change.
        changed: those that writing has changed so far.
        names: by which weights were found; where nobody asked transformers yet, that is done in the end.
        threads: so many tensors are computed beside each other.
    """

    shards: Sequence[Shard]
    kept: Sequence[Path]
    copied: Sequence[Path]
    texts: Mapping[str, str]
    changing: frozenset[str]
    changed: set[str]
    names: WeightNames
    threads: int = 1

    def size(self, place: Path) -> int:
        """Bytes that writing it into a folder of this file system takes; a hard link takes none."""
        again = [*self.copied, *(path for path in self.kept if not _can_link(path, place))]
        return (
            sum(shard.size for shard in self.shards)
            + sum(path.stat().st_size for path in again)
            + sum(len(text.encode()) for text in self.texts.values())
        )


def plan_merge(
    base: BaseModel,
    updates: Mapping[str, Update],
    how: Quantised | None = None,
    lengths: Mapping[str, Tensor] | None = None,
    whole: Mapping[str, Tensor] | None = None,
    also: Mapping[str, str] | None = None,
) -> MergePlan:
    """Decide what becomes of every file and tensor of the base model; write nothing.

    Args:
        base: the full-precision base model.
        updates: weight of the model → its update; every one must be found in the files.
        how: merge into the weights as this rounds them.
        lengths: weight → m [out] where its rows get lengths of their own: W' = m ∘ V / ‖V‖ with V = W + s B' A'.
        whole: weight → what stands in its place.
        also: other files that are written anew: name → content.

    Raises:
        UsageError: no update changes anything; a weight is missing from the base model, or has another
            shape or no dtype of floating point; a weights file is missing or damaged.
    """
    needed = [*updates, *(lengths or ()), *(whole or ())]
    names = (same_names(base, needed) if how is None else None) or weight_names(base)
    left = by_tensor(names, updates)
    rows = {names.tensor(weight): length for weight, length in (lengths or {}).items()}
    learned = {names.tensor(weight): value for weight, value in (whole or {}).items()}
    changing = {name for name, update in left.items() if name in rows or _is_any(update)}
    if len(left) < len(updates) or not (changing or learned):
        raise UsageError(
            f"{len(updates)} adapted weights would change {len(changing)} tensors of {base.folder}: "
            "there is nothing to merge"
        )
    files = {path: read_shard(path) for path in weight_files(base.folder)}
    _require_plain(base, left, {one.name for found, _ in files.values() for one in found})
    shards, kept = [], []
    changed: set[str] = set()
    for path, (stored, metadata) in files.items():
        planned = [
            _replaced(one, learned[one.name], changing, changed, how)
            if one.name in learned
            else _planned(one, left.get(one.name), how, changed, rows.get(one.name))
            for one in stored
        ]
        if all(after is None for after in planned):
            kept.append(path)
        else:
            both = zip(stored, planned, strict=True)
            tensors = [_as_it_is(before) if after is None else after for before, after in both]
            shards.append(Shard(path.name, tensors, metadata or {"format": "pt"}))
    texts = {
        **_texts(base.folder, shards, kept, None if how is None else how.dtype),
        **(also or {}),
    }
    copied = [
        path
        for path in sorted(base.folder.iterdir())
        if path.is_file()
        and path.suffix not in NOT_COPIED
        and path.name not in ("README.md", *texts)
    ]
    threads = min(_THREADS, cores()) if how is None else 1  # a device rounds one after another
    return MergePlan(shards, kept, copied, texts, frozenset(changing), changed, names, threads)


def by_tensor(names: WeightNames, updates: Mapping[str, Update]) -> dict[str, Update]:
    """The updates of the files' tensors; of a stack of which the files hold pieces, those of the pieces."""
    found: dict[str, Update] = {}
    packed = method_of(names.base) == "mxfp4"
    for weight, (down, up, scale) in updates.items():
        if packed and down.ndim == 3:
            raise UsageError(
                f"{names.base.folder}: weight '{weight}' is stored in 4 bits (mxfp4): {_AGAIN}"
            )
        if weight not in names.pieces:
            found[names.tensor(weight)] = (down, up, scale)
        for piece in names.pieces.get(weight, ()):
            rows = up[piece.expert, piece.start : piece.stop]
            found[piece.tensor] = (down[piece.expert], rows, scale)
    return found


def write_merged(
    plan: MergePlan, folder: Path, say: Callable[[str], None] = lambda text: None
) -> None:
    """Write a transformers folder: the base model's files with some weights changed.

    Args:
        plan: from `plan_merge`.
        folder: an existing empty folder.
        say: called with a line for each shard.

    Raises:
        CheckError: a tensor that an update falls on has stayed as it was, or is not the weight of its name.
    """
    with ThreadPoolExecutor(
        1
    ) as beside:  # what it loads takes seconds, and writing needs little of Python
        meant = beside.submit(require_meant, plan.names)
        _write(plan, folder, say)
        meant.result()


def _write(plan: MergePlan, folder: Path, say: Callable[[str], None]) -> None:
    for first in range(0, len(plan.shards), plan.threads):
        together = plan.shards[first : first + plan.threads]
        for number, shard in enumerate(together, start=first + 1):
            say(f"merging {shard.name} ({number} of {len(plan.shards)})")
        write_shards(folder, together, plan.threads)
        for shard in together:
            begin_sync(folder / shard.name)  # the disk works while the next files are computed
    unchanged = sorted(plan.changing - plan.changed)
    if unchanged:
        raise CheckError(
            f"{len(unchanged)} of {len(plan.changing)} tensors that the adapter changes came out as "
            f"they were, the first is {unchanged[0]}: its update is lost in their dtype's rounding"
        )
    for path in plan.kept:
        _link_or_copy(path, folder / path.name)
    for path in plan.copied:
        shutil.copyfile(path, folder / path.name)
    for name, text in plan.texts.items():
        write_text(folder / name, text)


def _is_any(update: Update) -> bool:
    """Whether B' A' is not zero: a row of it is not, or ‖B' A'‖² = Σ (B'ᵀ B') ∘ (A' A'ᵀ) is not."""
    down, up, _ = update
    if up.shape[-2] and bool((up[..., :1, :] @ down != 0).any()):
        return True
    return bool(((up.mT @ up) * (down @ down.mT)).sum() != 0)


def _planned(
    stored: Stored,
    update: Update | None,
    how: Quantised | None,
    changed: set[str],
    lengths: Tensor | None = None,
) -> Planned | None:
    """What becomes of one tensor; None where it stays as it is."""
    if update is not None:
        _require_fit(stored, update)
    if stored.dtype not in FLOATS:
        return None
    dtype = FLOATS[stored.dtype] if how is None else how.dtype
    if how is not None and stored.name in how.names:
        return _with(stored, dtype, partial(_rounded, stored, update, how, changed))
    if update is not None:
        return _with(stored, dtype, partial(_updated, stored, update, dtype, changed, lengths))
    if FLOATS[stored.dtype] == dtype:
        return None
    return _with(stored, dtype, partial(_cast, stored, dtype))


def _replaced(
    stored: Stored, value: Tensor, changing: set[str], changed: set[str], how: Quantised | None
) -> Planned | None:
    """A tensor that learned whole; None where it is as it was.

    Raises:
        UsageError: it has another shape, or is stored as no float.
    """
    if stored.dtype not in FLOATS or tuple(stored.shape) != tuple(value.shape):
        raise UsageError(
            f"{stored.file}: weight '{stored.name}' is {stored.dtype} {list(stored.shape)}, what was learned in "
            f"its place is {list(value.shape)}"
        )
    dtype = FLOATS[stored.dtype] if how is None else how.dtype
    new = value.detach().cpu().to(dtype)
    if torch.equal(new.reshape(-1), stored.whole().to(dtype).reshape(-1)):
        return (
            None
            if FLOATS[stored.dtype] == dtype
            else _with(stored, dtype, partial(_cast, stored, dtype))
        )
    changing.add(stored.name)

    def blocks() -> Iterator[np.ndarray]:
        changed.add(stored.name)
        yield as_bytes(new.reshape(stored.shape))

    return _with(stored, dtype, blocks)


def _with(
    stored: Stored, dtype: torch.dtype, blocks: Callable[[], Iterator[np.ndarray]]
) -> Planned:
    name = next(name for name, known in FLOATS.items() if known == dtype)
    values = stored.size // FLOATS[stored.dtype].itemsize
    return Planned(stored.name, name, stored.shape, values * dtype.itemsize, blocks)


def _as_it_is(stored: Stored) -> Planned:
    return Planned(stored.name, stored.dtype, stored.shape, stored.size, stored.blocks)


def _require_plain(base: BaseModel, updated: Iterable[str], names: Container[str]) -> None:
    """Refuse bitsandbytes' 4-bit weights, which may be stored as what looks like floats."""
    for name in updated:
        if f"{name}{_SCALES}" in names:
            raise UsageError(f"{base.folder}: weight '{name}' is stored in 4 bits: {_AGAIN}")


def _require_fit(stored: Stored, update: Update) -> None:
    down, up, _ = update
    if stored.dtype not in FLOATS:
        raise UsageError(
            f"{stored.file}: weight '{stored.name}' is stored as {stored.dtype}, expected one of "
            f"{', '.join(FLOATS)}: {_AGAIN}"
        )
    fitting = (*up.shape[:-1], down.shape[-1])
    if stored.shape != fitting:
        raise UsageError(
            f"{stored.file}: weight '{stored.name}' has shape {list(stored.shape)}, "
            f"the adapter fits {list(fitting)}"
        )


def _updated(
    stored: Stored,
    update: Update,
    dtype: torch.dtype,
    changed: set[str],
    lengths: Tensor | None,
) -> Iterator[np.ndarray]:
    for first, rows in stored.rows():
        yield as_bytes(_noted(stored, rows.to(dtype), update, first, changed, lengths))


def _rounded(
    stored: Stored, update: Update | None, how: Quantised, changed: set[str]
) -> Iterator[np.ndarray]:
    weight = how.rounded(stored.whole())
    step = stored.rows_in_block
    for first in range(0, len(weight), step):
        rows = weight[first : first + step]
        yield as_bytes(rows if update is None else _noted(stored, rows, update, first, changed))


def _noted(
    stored: Stored,
    rows: Tensor,
    update: Update,
    first: int,
    changed: set[str],
    lengths: Tensor | None = None,
) -> Tensor:
    """`_added`; a tensor of which a value becomes another one is noted."""
    if stored.name in changed:
        return _added(rows, update, first, lengths)
    before = rows.clone()
    after = _added(rows, update, first, lengths)
    if not torch.equal(before, after):
        changed.add(stored.name)
    return after


def _added(rows: Tensor, update: Update, first: int, lengths: Tensor | None = None) -> Tensor:
    """Some rows of W + s · B' A', cast back to the dtype of W's; of a stack its matrices below each other.

    With `lengths` m [out] each row is then given its length.
    """
    down, up, scale = update
    if up.ndim == 3:
        return _added_to_stack(rows, update, first)
    wide = torch.promote_types(rows.dtype, torch.float32)
    part = up[first : first + len(rows)].to(wide)
    found = rows.to(wide).addmm_(part, down.to(wide), alpha=scale)
    if lengths is not None:
        own = lengths[first : first + len(rows)].to(wide)
        found *= (own / found.norm(dim=1)).unsqueeze(1)
    return found.to(rows.dtype)


def _added_to_stack(rows: Tensor, update: Update, first: int) -> Tensor:
    """`_added`, expert by expert."""
    down, up, scale = update
    out, height, done = [], up.shape[1], 0
    while done < len(rows):
        expert, start = divmod(first + done, height)
        count = min(height - start, len(rows) - done)
        own = (down[expert], up[expert], scale)
        out.append(_added(rows[done : done + count], own, start))
        done += count
    return torch.cat(out)


def _cast(stored: Stored, dtype: torch.dtype) -> Iterator[np.ndarray]:
    for block in stored.blocks():
        yield as_bytes(torch.from_numpy(block).view(FLOATS[stored.dtype]).to(dtype))


def _texts(
    folder: Path, shards: Sequence[Shard], kept: Sequence[Path], dtype: torch.dtype | None
) -> dict[str, str]:
    """The files that tell of the weights' format, as far as it becomes another one.

    Args:
        folder: of the base model.
        shards: that are written.
        kept: weights files that stay.
        dtype: to which all is cast; None: every tensor keeps its own.
    """
    tensors: list[Planned | Stored] = [one for shard in shards for one in shard.tensors]
    tensors += [stored for path in kept for stored in read_shard(path)[0]]
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    texts = {CONFIG: _config(config, tensors, dtype)}
    if dtype is not None and (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        size = sum(tensor.size for tensor in tensors)
        index["metadata"] = {**index.get("metadata", {}), "total_size": size}
        texts[INDEX] = index
    return {
        name: json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        for name, content in texts.items()
        if name != CONFIG or content != config
    }


def _config(
    config: Mapping[str, Any], tensors: Sequence[Planned | Stored], dtype: torch.dtype | None
) -> dict[str, Any]:
    """config.json without a quantisation that no tensor has, and with the dtype that all have."""
    written = dict(config)
    if all(tensor.dtype in (*FLOATS, *_NUMBERS) for tensor in tensors):
        written.pop("quantization_config", None)
    if dtype is not None:
        keys = {"dtype", "torch_dtype"} & set(config) or {"dtype"}
        written.update(dict.fromkeys(keys, str(dtype).removeprefix("torch.")))
    return written


def _can_link(path: Path, place: Path) -> bool:
    """Whether a hard link in `place` can be made to the file behind `path`."""
    return path.stat().st_dev == place.stat().st_dev


def _link_or_copy(path: Path, target: Path) -> None:
    """A hard link to the file itself, whatever links lead to it; a copy where that is refused."""
    try:
        os.link(os.path.realpath(path), target)
    except OSError:  # another file system, one without links, or a file of somebody else's
        shutil.copyfile(path, target)
