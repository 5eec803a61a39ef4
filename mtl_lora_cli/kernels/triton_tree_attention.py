"""The gradient of keys and values where queries stand in trees, as Triton kernels.

The formulas are those of `triton_attention_kernels.py`. A tile of keys that many queries see is several
programs' (`trees.py`): each leaves dK and dV of its own queries in float32, and the second kernel adds
them up in their order, so that every run gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtl_lora_cli.kernels.triton_attention_kernels import (
    _key_gradient,
    _load,
    _store,
    _store_turned_back,
)


@triton.jit
def _sum_place(number, TILE: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the values of dK of a sum stand; those of dV stand behind them."""
    inside = tl.arange(0, TILE)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.cast(number, tl.int64) * (2 * TILE * WIDTH) + inside


@triton.jit(do_not_specialize=["count"])
def tree_backward_keys_kernel(  # type: ignore[no-untyped-def]
    dout, dout_stride, qkv, stride, cos, sin, angle_stride, parts, reach, depth, terms, dqkv,
    dqkv_stride, sums, count, scale, squeeze, scaling,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    STEP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TURN: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) % KEY_HEADS
    part = parts + tl.program_id(0) // KEY_HEADS * COLUMNS
    first = tl.load(part)
    if first < 0:
        return
    end = tl.load(part + 1)
    begin = tl.load(part + 2)
    stop = tl.load(part + 3)
    slot = tl.load(part + 4)
    SHARE: tl.constexpr = HEADS // KEY_HEADS
    key_place = (HEADS + group) * DIM
    value_place = key_place + KEY_HEADS * DIM
    positions = first + tl.arange(0, TILE)
    reaches = tl.load(reach + positions, mask=positions < end, other=0)
    before = positions
    if WINDOW:
        before = tl.load(depth + positions, mask=positions < end, other=0)
    k = _load(qkv + key_place, first, end, stride, TILE, DIM, WIDTH, True)
    v = _load(qkv + value_place, first, end, stride, TILE, DIM, WIDTH, True)
    dk = tl.zeros([TILE, WIDTH], dtype=tl.float32)
    dv = tl.zeros([TILE, WIDTH], dtype=tl.float32)
    for visit in range(tl.cdiv(stop - begin, STEP) * SHARE):
        dk, dv = _key_gradient(
            dk, dv, k, v, positions, reaches, before, visit, group * SHARE, begin, end, dout,
            dout_stride, qkv, stride, depth, terms, count, scale, squeeze, SHARE, STEP, DIM, WIDTH,
            True, True, WINDOW, CAP,
        )  # fmt: skip
    if slot < 0:
        _store(dqkv + value_place, first, end, dqkv_stride, dv, TILE, DIM, WIDTH)
        _store_turned_back(
            dqkv + key_place, first, end, dqkv_stride, dk * scaling, cos, sin, angle_stride,
            TILE, DIM, WIDTH, TURN,
        )  # fmt: skip
    else:
        own = sums + _sum_place(slot * KEY_HEADS + group, TILE, WIDTH)
        tl.store(own, dk)
        tl.store(own + TILE * WIDTH, dv)


@triton.jit
def tree_join_keys_kernel(  # type: ignore[no-untyped-def]
    sums, joins, cos, sin, angle_stride, dqkv, dqkv_stride, scaling,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) % KEY_HEADS
    join = joins + tl.program_id(0) // KEY_HEADS * COLUMNS
    first = tl.load(join)
    if first < 0:
        return
    end = tl.load(join + 1)
    slot = tl.load(join + 2)
    several = tl.load(join + 3)
    key_place = (HEADS + group) * DIM
    dk = tl.zeros([TILE, WIDTH], dtype=tl.float32)
    dv = tl.zeros([TILE, WIDTH], dtype=tl.float32)
    for number in range(several):
        own = sums + _sum_place((slot + number) * KEY_HEADS + group, TILE, WIDTH)
        dk += tl.load(own)
        dv += tl.load(own + TILE * WIDTH)
    _store(dqkv + key_place + KEY_HEADS * DIM, first, end, dqkv_stride, dv, TILE, DIM, WIDTH)
    _store_turned_back(
        dqkv + key_place, first, end, dqkv_stride, dk * scaling, cos, sin, angle_stride,
        TILE, DIM, WIDTH, TURN,
    )  # fmt: skip
