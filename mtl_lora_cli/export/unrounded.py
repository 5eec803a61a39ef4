"""What a merged folder's dtype rounds, taken back in memory.

    W' = round(W + s · B'_t A')          taken back: W + s · B'_t A', in float32

A model whose rounding is taken back computes what the run does to float32's own error, however far rounding itself
moves answers: a deep model amplifies it, and by how much is the model's matter. So the two can be told
apart. A value that is the sum but for rounding becomes the sum; one that is anything else stays as it was written,
and shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.export.merge import Update
from mtl_lora_cli.export.quantised import Quantised
from mtl_lora_cli.export.shards import FLOATS, Stored, beside_each_other
from mtl_lora_cli.export.weight_check import Meant, delta, stored_tensors
from mtl_lora_cli.export.weight_names import WeightNames, weight_names
from mtl_lora_cli.machine.cores import cores

_THREADS = 8
_VALUES = 2**24  # of a matrix that are summed together, in float64


@dataclass(frozen=True)
class _Part:
    """Some rows of a weight in memory, and what they have to be.

    Attributes:
        rows: [n, in] in float32, a view of the weight.
        stored: the base model's tensor.
        update: None: nothing falls on it.
        lengths: of the rows, [n].
    """

    rows: Tensor
    stored: Stored
    update: Update | None
    lengths: Tensor | None = None


@torch.no_grad()
def take_rounding_back(model: Any, meant: Meant, written: torch.dtype) -> None:
    """Put unrounded sums in the place of those that were rounded.

    Args:
        model: transformers' own in float32, of a merged folder.
        meant: what the folder has to hold.
        written: the dtype that its weights are rounded to.
    """
    for weight, value in meant.whole.items():
        own = model.get_parameter(weight)
        _replace(own, value.to(own), value.to(own).abs(), written)
    work = [partial(_part, one, meant.how, written) for one in _parts(model, meant)]
    beside_each_other(work, min(_THREADS, cores()) if meant.how is None else 1)


def _parts(model: Any, meant: Meant) -> Iterator[_Part]:
    """Every weight that a merge rounds."""
    names, stored = weight_names(meant.base), stored_tensors(meant.base.folder)
    for weight, update in meant.updates.items():
        own = model.get_parameter(weight)
        if weight in names.pieces:
            yield from _pieces(own, names, weight, update, stored)
        else:
            rows = own.flatten(0, -2)
            yield _Part(rows, stored[names.tensor(weight)], update, meant.lengths.get(weight))
    if meant.how is None:
        return
    for weight, tensor in names.tensors.items():
        if tensor in meant.how.names and weight not in meant.updates:
            yield _Part(model.get_parameter(weight).flatten(0, -2), stored[tensor], None)


def _pieces(
    own: Tensor, names: WeightNames, weight: str, update: Update, stored: Mapping[str, Stored]
) -> Iterator[_Part]:
    """A stack of experts of which the files hold pieces."""
    down, up, scale = update
    for piece in names.pieces[weight]:
        part = slice(piece.start, piece.stop)
        one = down[piece.expert], up[piece.expert, part], scale
        yield _Part(own[piece.expert, part], stored[piece.tensor], one)


@torch.no_grad()
def _part(one: _Part, how: Quantised | None, written: torch.dtype) -> None:
    """One weight's rows, a few at a time."""
    if one.stored.dtype not in FLOATS or one.rows.dtype != torch.float32:
        return
    base = _base(one.stored, how).to(one.rows.device).view(one.rows.shape)
    step = max(1, _VALUES // base.shape[-1])
    for first in range(0, len(base), step):
        rows, some = one.rows[first : first + step], base[first : first + step].double()
        exact = some
        if one.update is not None:
            on_device = tuple(part.to(rows.device) for part in one.update[:2])
            update = on_device[0], on_device[1], one.update[2]
            exact = some + delta(update, first, len(some), magnitude=False)
        if one.lengths is not None:
            own = one.lengths[first : first + step].to(exact)
            exact = exact * (own / exact.norm(dim=1)).unsqueeze(1)
        _replace(rows, exact, torch.maximum(exact.abs(), some.abs()), written)


def _base(stored: Stored, how: Quantised | None) -> Tensor:
    """The base model's tensor as the run has it in float32."""
    weight = stored.whole()
    if how is None or stored.name not in how.names:
        return weight if how is None else weight.to(how.dtype)
    return replace(how, dtype=torch.float32).rounded(weight.to(how.dtype))


def _replace(own: Tensor, exact: Tensor, size: Tensor, written: torch.dtype) -> None:
    """Where a value is as near to what it has to be as rounding leaves it, put that there."""
    limits = torch.finfo(written)
    near = (own - exact).abs() <= limits.eps * (size + limits.smallest_normal)
    own.copy_(torch.where(near, exact.to(own.dtype), own))
