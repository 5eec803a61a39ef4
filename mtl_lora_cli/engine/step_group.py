"""A group's products where each row adds one token: y, and what its task has yet to add to it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from mtl_lora_cli.adapters.routing import Slots
from mtl_lora_cli.engine.decoder import FusedDecoder
from mtl_lora_cli.engine.group import Group
from mtl_lora_cli.kernels.one_token import Added, Ups, product


class StepGroup:
    """A group's products for N rows of one token: y and what has yet to be added to it.

    Args:
        group: of a layer.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._frozen = group.frozen
        self._matrix = group.frozen.in_memory()
        self._stacked = group.frozen.above_down() if group.adapted else None
        self._bias = group.frozen.bias()
        self._down: Tensor | None = None
        self._ups: Ups | None = None
        if self._stacked is not None and self._bias is not None:
            zeros = self._bias.new_zeros(len(self._stacked) - len(self._bias))
            self._bias = torch.cat([self._bias, zeros])

    def learn(self, mixing: Tensor | None, slots: Slots, dtype: torch.dtype) -> None:
        """Make A and U of the adapters' tensors as they are now, in their places of the last time."""
        products, count = self._group.products, len(self._group.adapted)
        if products is None or slots.count == 0:
            return
        tensors = cast(list[Tensor], self._group.tensors(mixing, slots)[1:])
        downs, ups = tensors[:count], tensors[count:]
        factors = products.factors(self._frozen, dtype, downs, ups, mixing)
        if self._stacked is None:
            self._down = _kept(self._down, factors.down)
        each = [_ups_of_tasks(up, products, mixing, number) for number, up in enumerate(ups)]
        width, out = len(factors.down) // count, self._frozen.shape[0]
        matrix = torch.zeros(slots.count, width, out, dtype=dtype, device=each[0].device)
        starts = torch.zeros(out, dtype=torch.int32, device=matrix.device)
        for number, ((start, stop), own) in enumerate(zip(products.spans, each, strict=True)):
            matrix[:, : own.shape[1], start:stop] = own
            starts[start:stop] = number * width
        if self._ups is None:
            self._ups = Ups(matrix, products.spans, starts)
        else:
            self._ups.matrix.copy_(matrix)

    def __call__(self, h: Tensor, slot: Tensor) -> Added:
        out = self._frozen.shape[0]
        if self._stacked is not None:
            both = product(h, self._stacked, self._bias)
            return Added(both[:, :out], both[:, out:], self._ups, slot)
        if self._matrix is not None and self._matrix.dtype == h.dtype:
            y = product(h, self._matrix, self._bias)
        else:
            y = self._frozen.product(h, self._frozen.weights())
        z = None if self._down is None else h @ self._down.T
        return Added(y, z, self._ups, slot)


def _kept(place: Tensor | None, value: Tensor) -> Tensor:
    """A value at the place of the last time, where it fits: graphs read it there."""
    if place is None or place.shape != value.shape:
        return value.clone()
    return place.copy_(value)


def _ups_of_tasks(up: Tensor, products: Any, mixing: Tensor | None, number: int) -> Tensor:
    """Uᵀ = (s B M_t)ᵀ of one projection for each task present, [P, k, out]."""
    block = up.permute(1, 0, 2).flatten(1) * products.scales[number]  # [out, m]
    if mixing is None:
        return block.T[None]  # the same for all
    own = mixing[number]
    if products.spread_by == "own":
        return block.T[None] * own[:, : block.shape[1], None]
    return torch.einsum("om,pmk->pko", block, own[:, : block.shape[1]].to(block.dtype))


def ups_bytes(decoder: FusedDecoder, dtype: torch.dtype) -> int:
    """What U of one task takes."""
    groups = [group for layer in decoder.layers for group in layer.groups if group.adapted]
    sizes = [max(one.rank for one in group.adapted) * group.frozen.shape[0] for group in groups]
    return dtype.itemsize * sum(sizes)
