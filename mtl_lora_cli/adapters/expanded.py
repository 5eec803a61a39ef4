"""Quantised weights as dense matrices: where they are made, and when.

    W = [W_1; …; W_J]  [Σ out_j, in]        in the dtype of a product, of values of 4 or 8 bits

A product makes its matrix in memory that the next one uses again (`buffer`). On a card two pieces of memory take
turns: while one product runs, a second stream makes the matrix of the next one (`Ahead`). All ways make the same
bits, in rows of the same pitch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mtl_lora_cli.kernels.backend import PITCH

WORTH = 2**22  # values of a matrix from which on a second stream gives more than it takes
_PROGRAMS = 16  # multiprocessors that make a matrix, while a product has the others
_buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}


class Dense(Protocol):
    """Frozen weights that are made dense for their products; see `adapters/frozen.py`."""

    @property
    def outer(self) -> tuple[int, int]:
        """Rows and columns of the matrix, margins included."""

    def fill(self, out: Tensor, programs: int | None = None) -> Tensor:
        """Write W into a matrix of that size; `programs`: see `kernels/nf4.py`."""


def pitched(shape: tuple[int, int]) -> int:
    """Values of a matrix whose rows begin at multiples of 128 bytes, where they have 16 bits."""
    return shape[0] * -(-shape[1] // PITCH) * PITCH


def laid(memory: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix in flat memory of at least `pitched` values."""
    return memory[: pitched(shape)].view(shape[0], -1)[:, : shape[1]]


def buffer(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Memory for one matrix; whoever asks next gets the same."""
    key, wanted = (device, dtype), pitched(shape)
    if key not in _buffers or _buffers[key].numel() < wanted:
        _buffers[key] = torch.empty(wanted, dtype=dtype, device=device)
    return laid(_buffers[key], shape)


class Ahead:
    """Two matrices of the weights of a model: one for the product that runs, one for whichever comes next.

    A product forward is followed by that of the next weights, a product backward by that of those before; where
    a block computes its input again, both are there already. A wrong guess costs time only. A CUDA graph takes the
    second stream along; whoever ends its capture calls `forget` inside.

    Args:
        order: the weights in the order of a forward pass.
        device, dtype: of the matrices. Without a card everything happens in one line.
    """

    def __init__(self, order: Sequence[Dense], device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._order = tuple(order)
        self._places = {id(one): place for place, one in enumerate(order)}
        most = max(pitched(one.outer) for one in order)
        self._memory = [torch.empty(most, dtype=dtype, device=device) for _ in range(2)]
        self._owners: list[Dense | None] = [None, None]
        self._last = 0
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._running: bool | None = None  # on the second stream, inside a capture or outside
        for memory in self._memory:
            if self._side is not None:
                memory.record_stream(self._side)

    def matrix(self, one: Dense, *, backward: bool) -> Tensor:
        """W of some weights, [outer]; it is theirs until the next one is asked for.

        Args:
            one: of the order.
            backward: it is for dx = dy W, not for y = x Wᵀ.
        """
        self._join()
        if one not in self._owners:
            self._make(one, 1 - self._last)
        self._last = self._owners.index(one)
        place = self._places[id(one)] + (-1 if backward else 1)
        if 0 <= place < len(self._order) and self._order[place] not in self._owners:
            self._begin(self._order[place], 1 - self._last)
        return laid(self._memory[self._last], one.outer)

    def forget(self) -> None:
        """What the buffers hold is not known any more: a pass begins, or one was captured."""
        self._join()
        self._owners = [None, None]

    def _begin(self, one: Dense, place: int) -> None:
        """Make it beside the product that is launched next."""
        if self._side is None:
            return self._make(one, place)
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            self._make(one, place, _PROGRAMS)
        self._running = torch.cuda.is_current_stream_capturing()
        return None

    def _make(self, one: Dense, place: int, programs: int | None = None) -> None:
        self._owners[place] = one
        one.fill(laid(self._memory[place], one.outer), programs)

    def _join(self) -> None:
        running, self._running = self._running, None
        if running is None or self._side is None:
            return
        # A capture begins when the card has done all before it.
        if running == torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().wait_stream(self._side)
