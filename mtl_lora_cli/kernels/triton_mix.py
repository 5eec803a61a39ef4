"""Triton kernels of `mix.py`.

Positions of a task stand together, so a block of them has few slots: for each of these the block is
multiplied by one matrix on the tensor cores, and the rows of that slot are taken.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 64  # rows or columns of M at once
_SUMS = 2**25  # numbers of partial sums, at most


@triton.jit
def _more(total, value, factor):
    """total + value factor; beside values of 16 bits a factor of 32 is the sum of two of 16."""
    if value.dtype.primitive_bitwidth == 16:
        high = factor.to(value.dtype)
        low = (factor - high.to(tl.float32)).to(value.dtype)
        total = tl.dot(value, high, total)
        total = tl.dot(value, low, total)
    else:
        total = tl.dot(value.to(tl.float32), factor, total, input_precision="ieee")
    return total


@triton.jit
def _adapter_mix(
    z, mixing, slot, u, z_stride, u_stride, z_width, u_width, positions, rows, columns,
    layer_stride, slot_stride, row_stride, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < positions
    own = tl.load(slot + at, mask=inside, other=-1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    z += at.to(tl.int64)[:, None] * z_stride + layer * z_width
    mixing += layer * layer_stride + row[None, :] * row_stride
    total = tl.zeros((BLOCK, ROWS), dtype=tl.float32)
    left = own
    mine = tl.max(left, axis=0)
    while mine >= 0:
        chosen = own == mine
        matrix = mixing + mine.to(tl.int64) * slot_stride
        left = tl.where(chosen, -1, left)
        mine = tl.max(left, axis=0)
        product = tl.zeros((BLOCK, ROWS), dtype=tl.float32)
        for step in tl.static_range(STEPS):
            column = step * COLUMNS + tl.arange(0, COLUMNS)
            known = column < columns
            value = tl.load(z + column[None, :], mask=chosen[:, None] & known[None, :], other=0.0)
            factor = tl.load(
                matrix + column[:, None] * column_stride,
                mask=known[:, None] & (row < rows)[None, :],
                other=0.0,
            )
            product = _more(product, value, factor.to(tl.float32))
        # Not masked before the product: a matrix that is no number would reach the other rows.
        total = tl.where(chosen[:, None], product, total)
    u += at.to(tl.int64)[:, None] * u_stride + layer * u_width + row[None, :]
    tl.store(u, total.to(u.dtype.element_ty), mask=inside[:, None] & (row < u_width)[None, :])


@triton.jit
def _adapter_mix_gradient(
    du, z, slot, partial, du_stride, z_stride, du_width, z_width, positions, slots, rows, columns,
    pieces, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    mine = tl.program_id(1)
    across = tl.cdiv(columns, COLUMNS)
    tiles = tl.cdiv(rows, ROWS) * across
    layer, part = tl.program_id(2) // tiles, tl.program_id(2) % tiles
    layers = tl.num_programs(2) // tiles
    row = (part // across) * ROWS + tl.arange(0, ROWS)
    column = (part % across) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    every = tl.arange(0, PIECE)
    for piece in range(pieces):
        begin = (tl.program_id(0) * pieces + piece) * PIECE
        all_own = tl.load(slot + begin + every, mask=begin + every < positions, other=-1) == mine
        first = tl.min(tl.where(all_own, every, PIECE), axis=0)
        last = tl.max(tl.where(all_own, every, -1), axis=0)
        # A slot's positions stand together: most programs have nothing to do, the others a few blocks.
        for start in range(first // BLOCK * BLOCK, last + 1, BLOCK):
            at = begin + start + tl.arange(0, BLOCK)
            own = tl.load(slot + at, mask=at < positions, other=-1) == mine
            place = at.to(tl.int64)[:, None]
            gradient = tl.load(
                du + place * du_stride + layer * du_width + row[None, :],
                mask=own[:, None] & (row < rows)[None, :],
                other=0.0,
            )
            value = tl.load(
                z + place * z_stride + layer * z_width + column[None, :],
                mask=own[:, None] & (column < columns)[None, :],
                other=0.0,
            )
            total += tl.dot(tl.trans(gradient), value, input_precision="ieee")
    place = ((tl.program_id(0) * layers + layer) * slots + mine).to(tl.int64) * rows * columns
    tl.store(
        partial + place + row[:, None] * columns + column[None, :],
        total,
        mask=(row < rows)[:, None] & (column < columns)[None, :],
    )


@triton.jit
def _adapter_of_tasks(
    z, slot, out, z_stride, out_stride, positions, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    place = at.to(tl.int64)[:, None]
    inside = (at < positions)[:, None] & (column < width)[None, :]
    active = (tl.load(slot + at, mask=at < positions, other=-1) >= 0)[:, None]
    value = tl.load(z + place * z_stride + column[None, :], mask=inside & active, other=0.0)
    tl.store(out + place * out_stride + column[None, :], value, mask=inside)


def mix(z: Tensor, matrices: Tensor, slot: Tensor, *, width: int, out: Tensor | None) -> Tensor:
    """See `mix.mix`; `matrices`: M, or its transpose."""
    layers, _, rows, columns = matrices.shape
    positions = z.shape[0]
    u = out
    if u is None:
        u = torch.empty(positions, layers * width, dtype=z.dtype, device=z.device)
    if not positions:
        return u
    down, across = tile(width), tile(columns)
    steps = triton.cdiv(columns, across)
    # Measured on one H200: small matrices by few positions, which seldom have a second slot.
    block, warps = (32, 2) if down * across * steps <= 2048 else (64, 4)
    _adapter_mix[(triton.cdiv(positions, block), layers, triton.cdiv(width, down))](
        z, matrices, slot, u, z.stride(0), u.stride(0), z.shape[1] // layers, width,
        positions, rows, columns, *matrices.stride(),
        ROWS=down, COLUMNS=across, STEPS=steps, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return u


def mix_gradient(du: Tensor, z: Tensor, slot: Tensor, like: torch.Size) -> Tensor:
    """See `mix.mix_gradient`: each chunk of positions a partial sum, then their sum; no atomics."""
    layers, slots, rows, columns = like
    positions = len(slot)
    most = max(1, _SUMS // like.numel())
    # Measured there, too: partial sums cost more than waiting only where they are large.
    piece = 128 if like.numel() <= 2**15 else 256 if like.numel() <= 2**16 else 512
    pieces = max(1, triton.cdiv(triton.cdiv(positions, piece), most))
    chunks = max(1, triton.cdiv(positions, piece * pieces))
    partial = torch.empty(chunks, *like, dtype=torch.float32, device=z.device)
    down, across = tile(rows), tile(columns)
    tiles = triton.cdiv(rows, down) * triton.cdiv(columns, across)
    _adapter_mix_gradient[(chunks, slots, layers * tiles)](
        du, z, slot, partial, du.stride(0), z.stride(0), du.shape[1] // layers,
        z.shape[1] // layers, positions, slots, rows, columns, pieces,
        ROWS=down, COLUMNS=across, PIECE=piece, BLOCK=64, num_warps=4, num_stages=2,
    )  # fmt: skip
    return partial.sum(0)


def of_tasks(z: Tensor, slot: Tensor, out: Tensor | None) -> Tensor:
    """See `mix.of_tasks`."""
    positions, width = z.shape
    found = torch.empty(z.shape, dtype=z.dtype, device=z.device) if out is None else out
    if positions:
        block, across = 32, min(128, triton.next_power_of_2(width))
        _adapter_of_tasks[(triton.cdiv(positions, block), triton.cdiv(width, across))](
            z, slot, found, z.stride(0), found.stride(0), positions, width,
            BLOCK=block, WIDTH=across, num_warps=4,
        )  # fmt: skip
    return found


def tile(side: int) -> int:
    """What a tensor core takes at once of so many."""
    return min(_TILE, max(16, triton.next_power_of_2(side)))
