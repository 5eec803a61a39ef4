"""Triton kernel of `place.py`: one launch for matrices of many places and sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtl_lora_cli.kernels.place import Place

_BLOCK = 1024


@triton.jit
def _adapter_places(table, scales, like, BLOCK: tl.constexpr):
    entry = table + tl.program_id(1) * 7
    count, rows, columns = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first < count:
        source = tl.load(entry).to(tl.pointer_type(tl.float32))
        target = tl.load(entry + 1).to(tl.pointer_type(like.dtype.element_ty))
        plane_stride, row_stride = tl.load(entry + 5), tl.load(entry + 6)
        at = first + tl.arange(0, BLOCK)
        inside = at < count
        line = at // columns
        place = (line // rows) * plane_stride + (line % rows) * row_stride + at % columns
        value = tl.load(source + at, mask=inside, other=0.0) * tl.load(scales + tl.program_id(1))
        tl.store(target + place, value.to(like.dtype.element_ty), mask=inside)


class Table:
    """Places of which the addresses are known to the card; whoever holds it holds their memory, too.

    Args:
        places: for which `place.at_once` holds; all on one device.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = list(places)
        device = places[0].target.device
        rows = [
            [
                source.data_ptr(),
                target.data_ptr(),
                source.numel(),
                *source.shape[1:],
                *target.stride()[:2],
            ]
            for source, target, _ in places
        ]
        self._table = torch.tensor(rows, dtype=torch.int64, device=device)
        scales = [scale for _, _, scale in places]
        self._scales = torch.tensor(scales, dtype=torch.float32, device=device)
        self._blocks = triton.cdiv(max(row[2] for row in rows), _BLOCK)
        self._like: Tensor = places[0].target

    def write(self) -> None:
        """All of them, as the sources are now."""
        grid = (self._blocks, len(self._places))
        _adapter_places[grid](self._table, self._scales, self._like, BLOCK=_BLOCK, num_warps=4)
