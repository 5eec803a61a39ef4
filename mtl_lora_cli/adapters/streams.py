"""One autograd function for a frozen projection over streams: pieces of the same length, one a task.

    y = W x + b + s B A x + s B_t A_t x        in the piece of task t; a piece of no task has the first three

The rows of A and A_t are multiplied piece by piece, as one narrow product: that is less work than rows of all
tasks, and nothing of a task, not even what is no number, gets into another's piece.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_lora_cli.adapters.frozen import ALIGNMENT, FrozenWeights
from mtl_lora_cli.adapters.function import AdapterProducts, wide_product

_MOST_PARTS = 64  # of a piece, whose products with its gradients run side by side
_PART = 512  # positions of a part at least


class Streams(NamedTuple):
    """How positions are cut into pieces.

    Attributes:
        pieces: P, those of the tasks first.
        tasks: T of them have parts of their own.
        common: rows of A, which all pieces have.
    """

    pieces: int
    tasks: int
    common: int

    def narrow(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """A [k + T r', in], A_t below each other → [P, k + r', in] of each piece, filled up with zeros.

        The rows are a multiple of what a product likes; those of nobody are zero.
        """
        own = len(matrix) - self.common
        rows = self.common + (own // self.tasks if self.tasks else 0)
        filled = -(-rows // ALIGNMENT) * ALIGNMENT
        found = matrix.new_zeros(self.pieces, filled, matrix.shape[1], dtype=dtype)
        found[:, : self.common] = matrix[: self.common]
        if self.tasks:
            found[: self.tasks, self.common : rows] = matrix[self.common :].unflatten(
                0, (self.tasks, -1)
            )
        return found

    def widened(self, each: Tensor, rows: int) -> Tensor:
        """The gradient of what `narrow` was given, [rows, in], of one of what it gave."""
        shared = each[:, : self.common].sum(0)
        if not self.tasks:
            return shared
        own = (rows - self.common) // self.tasks
        parts = each[: self.tasks, self.common : self.common + own]
        return torch.cat([shared, parts.flatten(0, 1)])


class AdaptedStreams(torch.autograd.Function):
    """See the module.

    Args of `apply`: x [P n, in], frozen, products (s and dropout), streams, mask [P n, in] (bool or None), the
    frozen weight, A [k + T r', in] and B [out, k + T r']. Returns [P n, out].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: FrozenWeights,
        products: AdapterProducts,
        streams: Streams,
        mask: Tensor | None,
        weight: Tensor,
        down: Tensor,
        up: Tensor,
    ) -> Tensor:
        low = streams.narrow(down, x.dtype)
        high = streams.narrow(up.T, x.dtype).mul_(products.scales[0])
        y = frozen.product(x, (weight,))
        z = torch.bmm(_cut(products.dropped(x, mask), streams.pieces), low.mT)
        _cut(y, streams.pieces).baddbmm_(z, high)
        ctx.save_for_backward(x, z, mask, low, high, weight)
        ctx.static = (frozen, products, streams, down.shape, down.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        frozen, products, streams, (rows, _), dtype = ctx.static
        x, z, mask, low, high, weight = ctx.saved_tensors
        dy = dy.contiguous()
        own = _cut(dy, streams.pieces)
        dz = torch.bmm(own, high.mT)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = frozen.input_gradient(dy, (weight,))
            if mask is None:
                _cut(dx, streams.pieces).baddbmm_(dz, low)
            else:
                dx += products.dropped(torch.bmm(dz, low).flatten(0, 1), mask)
        kept = _cut(products.dropped(x, mask), streams.pieces)
        ddown = streams.widened(products_of_pieces(dz, kept), rows).to(dtype)
        dup = streams.widened(products_of_pieces(z, own), rows).to(dtype).mul_(products.scales[0])
        return dx, None, None, None, None, None, ddown, dup.T


def _cut(x: Tensor, pieces: int) -> Tensor:
    return x.view(pieces, -1, x.shape[1])


def products_of_pieces(a: Tensor, b: Tensor) -> Tensor:
    """a_pᵀ b_p of each piece p, [P, n, i] and [P, n, j] → [P, i, j], float32 or better.

    The sums run over all positions of a piece, which are cut into parts so that a card has enough to do.
    """
    pieces, length, _ = a.shape
    parts = _parts(length)
    a, b = (one.reshape(pieces * parts, length // parts, -1) for one in (a, b))
    return wide_product(a.mT, b).unflatten(0, (pieces, parts)).sum(1)


def _parts(length: int) -> int:
    """The most equal parts, up to `_MOST_PARTS`, of at least `_PART` positions."""
    most = min(_MOST_PARTS, length // _PART)
    return next((count for count in range(most, 1, -1) if length % count == 0), 1)
