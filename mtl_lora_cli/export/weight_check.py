"""A merged folder held against the base model's files and the task's update, tensor by tensor, in float64.

    W' = round(W + s · B'_t A')

rounded once to the dtype of the file. A value may be the other neighbour of a sum that lies between the two, as
near to their middle as sums in float32 are to those in float64. What no update falls on is the base model's to
the last bit, and so are the other files. Nothing that wrote the folder is asked: names are looked up again, sums
are formed again, and each tensor has to begin as safetensors' own reader has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export.merge import NOT_COPIED, Update, by_tensor
from mtl_lora_cli.export.quantised import Quantised
from mtl_lora_cli.export.shards import FLOATS, Stored, beside_each_other, read_shard
from mtl_lora_cli.export.weight_names import weight_names
from mtl_lora_cli.machine.cores import cores
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.files import CONFIG, INDEX, weight_files

_THREADS = 8
_VALUES = 2**16  # that are compared at a time
_TOLD = {
    "dtype",
    "torch_dtype",
    "quantization_config",
}  # what config.json says of the weights' format
_LENGTH = 256  # roundings of a row's length in float32, summed over its columns


@dataclass(frozen=True)
class Meant:
    """What a merged folder has to hold.

    Attributes:
        base: the base model.
        updates: weight of the model → its update.
        how: as a quantised run rounds the base model's weights; None: they are as the files have them.
        lengths: weight → m [out], the lengths of its rows.
        whole: weight → what stands in its place.
        also: other files that are written anew: name → content.
    """

    base: BaseModel
    updates: Mapping[str, Update]
    how: Quantised | None
    lengths: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]
    also: Mapping[str, str]


def fault_in(folder: Path, meant: Meant) -> str | None:
    """The first thing in which a merged folder is not what it has to be; None: there is none.

    Args:
        folder: as `merge.write_merged` leaves it.
        meant: what it has to be.
    """
    try:
        return _other_files(folder, meant) or _weights(folder, meant)
    except (UsageError, OSError, ValueError, SafetensorError) as error:  # it cannot be read
        return " ".join(str(error).split())


def _other_files(folder: Path, meant: Meant) -> str | None:
    """The first file beside the weights that is not the base model's, or missing, or too many."""
    base = meant.base.folder
    texts = {path.name for path in base.iterdir() if path.is_file()} - {"README.md"}
    texts = {name for name in texts if Path(name).suffix not in NOT_COPIED} | set(meant.also)
    own = texts | {path.name for path in weight_files(base)}
    there = {path.name for path in folder.iterdir()} - {"README.md"}
    for name in sorted(own ^ there):
        return f"{name} {'is missing' if name in own else 'does not belong there'}"
    for name in sorted(texts):
        found = (folder / name).read_bytes()
        expected = meant.also.get(name)
        wanted = (base / name).read_bytes() if expected is None else expected.encode()
        if found != wanted and not _same_but_format(name, found, wanted, meant):
            return f"{name} differs from the base model's"
    return None


def _same_but_format(name: str, found: bytes, wanted: bytes, meant: Meant) -> bool:
    """Whether two files are the same but for what they say of the weights' dtype and quantisation."""
    if name not in (CONFIG, INDEX):
        return False
    one, other = json.loads(found), json.loads(wanted)
    if name == INDEX:
        return meant.how is not None and one["weight_map"] == other["weight_map"]
    free = _TOLD if meant.how is not None else {"quantization_config"}
    return all(one.get(key) == other.get(key) for key in (one.keys() | other.keys()) - free)


def _weights(folder: Path, meant: Meant) -> str | None:
    """The first tensor that is not what it has to be."""
    before, after = (stored_tensors(place) for place in (meant.base.folder, folder))
    for name in sorted(before.keys() ^ after.keys()):
        return f"tensor '{name}' {'is missing' if name in before else 'does not belong there'}"
    names = weight_names(meant.base)
    updates = by_tensor(names, meant.updates)
    lengths = {names.tensor(weight): length for weight, length in meant.lengths.items()}
    whole = {names.tensor(weight): value for weight, value in meant.whole.items()}
    work = [
        partial(
            _fault,
            before[name],
            after[name],
            meant.how,
            updates.get(name),
            lengths.get(name),
            whole.get(name),
        )
        for name in sorted(before, key=lambda name: -before[name].size)  # the longest ones first
    ]
    threads = min(_THREADS, cores()) if meant.how is None else 1
    return next((one for one in beside_each_other(work, threads) if one is not None), None)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder by name.

    Raises:
        UsageError: two are called alike, or one begins otherwise than safetensors' own reader has it.
    """
    found: dict[str, Stored] = {}
    for path in weight_files(folder):
        stored, _ = read_shard(path)
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != {one.name for one in stored}:
                raise UsageError(f"{path.name}: its header names other tensors than it holds")
            for one in stored:
                _require_begins(one, file)
        if twice := found.keys() & {one.name for one in stored}:
            raise UsageError(f"{path.name}: tensor '{min(twice)}' is in two files")
        found |= {one.name: one for one in stored}
    return found


def _require_begins(stored: Stored, file: Any) -> None:
    """A tensor's first numbers, as two readers have them."""
    if stored.dtype not in FLOATS or not stored.size or not stored.shape:
        return
    theirs = file.get_slice(stored.name)[:1].flatten()[:16].contiguous()
    ours = next(stored.blocks(theirs.numel() * theirs.element_size()))
    if theirs.view(torch.uint8).numpy().tobytes() != ours.tobytes():
        raise UsageError(
            f"{stored.file.name}: tensor '{stored.name}' lies elsewhere than its header says"
        )


def _fault(
    before: Stored,
    after: Stored,
    how: Quantised | None,
    update: Update | None,
    lengths: Tensor | None,
    whole: Tensor | None,
) -> str | None:
    """In what a tensor is not what it has to be."""
    changes = how is not None and before.dtype in FLOATS
    dtype = before.dtype
    if changes:
        assert how is not None
        dtype = next(name for name, known in FLOATS.items() if known == how.dtype)
    if (after.dtype, after.shape) != (dtype, before.shape):
        return (
            f"tensor '{after.name}' is {after.dtype} {list(after.shape)}, "
            f"expected {dtype} {list(before.shape)}"
        )
    if whole is not None:
        new = whole.detach().cpu().to(FLOATS[dtype]).reshape(before.shape)
        same = torch.equal(after.whole(), new)
    elif update is not None or changes:
        same = all(
            _is_sum(rows, base, update, first, lengths)
            for first, rows, base in _both(before, after, how)
        )
    else:
        same = _same_bytes(before, after)
    meant = "what it has to be" if update is None else "the base model's plus the update"
    return None if same else f"tensor '{after.name}' is not {meant}"


def _same_bytes(before: Stored, after: Stored) -> bool:
    """Whether two tensors hold the same bytes; of one file with two names that is known."""
    if before.file.samefile(after.file):
        return (before.start, before.size) == (after.start, after.size)
    blocks = zip(before.blocks(), after.blocks(), strict=True)
    return all(bytes_equal(one, other) for one, other in blocks)


def bytes_equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether uint8 [bytes] are the same; eight of them are compared at once."""
    whole = len(one) // 8 * 8
    return bool(
        np.array_equal(one[:whole].view(np.uint64), other[:whole].view(np.uint64))
        and np.array_equal(one[whole:], other[whole:])
    )


def _both(
    before: Stored, after: Stored, how: Quantised | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First row, some rows of the merged tensor, and the same of the base model's, [n, in] each.

    Few enough at a time that all that is computed of them in float64 stays in a core's own cache.
    """
    step = max(1, _VALUES // before.shape[-1])
    for first, rows, base in _blocks_of_both(before, after, how):
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            yield first + start, rows[part], base[part]


def _blocks_of_both(
    before: Stored, after: Stored, how: Quantised | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The same, as many at a time as are read."""
    if how is not None and before.name in how.names:
        weight = how.rounded(before.whole())
        for first, rows in after.rows():
            yield first, rows, weight[first : first + len(rows)]
        return
    for (first, rows), (_, base) in zip(after.rows(), before.rows(), strict=True):
        yield first, rows, base if how is None else base.to(how.dtype)


def _is_sum(
    rows: Tensor, base: Tensor, update: Update | None, first: int, lengths: Tensor | None
) -> bool:
    """Whether rows [n, in] of a merged tensor are round(W + s · B' A'), or round(m ∘ V / ‖V‖) of that V."""
    if update is None:
        return bool(((rows == base) | (rows.isnan() & base.isnan())).all())
    exact = base.double() + delta(update, first, len(base), magnitude=False)
    factor: Tensor | None = None
    if lengths is not None:
        factor = (lengths[first : first + len(base)].double() / exact.norm(dim=1)).unsqueeze(1)
        exact *= factor
    rounded = exact.to(rows.dtype)
    other = (rows != rounded) & ~(rows.isnan() & exact.isnan())
    some = other.any(dim=1)
    if not some.any():
        return True
    sizes = base.double().abs() + delta(update, first, len(base), magnitude=True)
    epsilon = torch.finfo(torch.promote_types(base.dtype, torch.float32)).eps
    error = epsilon * (update[0].shape[-2] + 4) * sizes
    if factor is not None:
        error = error * factor.abs() + _LENGTH * epsilon * exact.abs()
    far = (rows.double() - exact).abs() > (rounded.double() - exact).abs() + 2 * error
    wrong = other & (far | ~rows.isfinite())
    return not bool(wrong.any())


def delta(update: Update, first: int, count: int, *, magnitude: bool) -> Tensor:
    """Some rows of s · B' A' in float64, a stack's matrices below each other; or of |s| |B'| |A'|."""
    down, up, scale = update
    if magnitude:
        down, up, scale = down.abs(), up.abs(), abs(scale)
    if up.ndim == 2:
        part: Tensor = scale * (up[first : first + count].double() @ down.double())
        return part
    height, found, done = up.shape[1], [], 0
    while done < count:
        expert, start = divmod(first + done, height)
        some = min(height - start, count - done)
        found.append(
            delta((down[expert], up[expert], scale), start, some, magnitude=False)
        )  # both are magnitudes already where they have to be
        done += some
    return torch.cat(found)
