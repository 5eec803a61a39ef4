"""Triton kernels of `one_token.py`.

A step of few rows is bound by reading the weights, and then by the number of launches: what a task adds
to a product is computed by the kernel that reads the product anyway. On cards that can (compute capability 9),
a kernel is launched while the one before it ends (programmatic dependent launch): it waits before it reads what
that one wrote.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mtl_lora_cli.kernels.gated import CUBE, ROOT, Activation
from mtl_lora_cli.kernels.one_token import Added, Ups
from mtl_lora_cli.kernels.rotary import Turn

_BLOCK = 512
_KEYS = 64  # taken into the running softmax at once
_OUTPUTS = 2  # of a single row's product, in one program
_PROGRAMS = 264  # two for each multiprocessor of a large card
LOG2_E = 1.4426950408889634
EARLY = True  # kernels are launched early, where the card can


@triton.jit
def _begin(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """The next kernel may be launched; this one goes on when all that ran before it has ended."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _raised(  # type: ignore[no-untyped-def]
    z, first, own, width, at, inside, K: tl.constexpr, BLOCK: tl.constexpr
):
    """Σ_j z[first + j] U[j, at], float32; eight rows of U are asked for at once."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, 8):
        j = start + tl.arange(0, 8)[:, None]
        up = tl.load(own + j * width + at, mask=(j < K) & inside[None, :], other=0.0)
        low = tl.load(z + (first + j), mask=j < K, other=0.0)
        total += tl.sum(low.to(tl.float32) * up.to(tl.float32), axis=0)
    return total


@triton.jit
def _whole(  # type: ignore[no-untyped-def]
    y, z, ups, starts, slots, out, width, y_stride, z_stride,
    K: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    _begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(y + row * y_stride + at, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(starts + at, mask=inside, other=0)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        own = ups + slot * K * width
        value += _raised(z + row * z_stride, first, own, width, at, inside, K, BLOCK)
    tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=inside)


def whole(y: Tensor, z: Tensor, ups: Ups, slot: Tensor) -> Tensor:
    """See `one_token.whole`."""
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    rows, width = y.shape
    _whole[(rows, triton.cdiv(width, _BLOCK))](
        y, z, ups.matrix, ups.starts, slot, out, width, y.stride(0), z.stride(0),
        K=ups.matrix.shape[1], BLOCK=_BLOCK, **_launch(y.device),
    )  # fmt: skip
    return out


@triton.jit
def _normed(  # type: ignore[no-untyped-def]
    x, y, z, ups, starts, slots, weight, total, out, width, y_stride, z_stride, eps,
    K: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    _begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(y + row * y_stride + at, mask=inside, other=0.0)
    before = tl.load(x + row * width + at, mask=inside, other=0.0)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if K:
        slot = tl.load(slots + row).to(tl.int64)
        if slot >= 0:
            first = 0
            if not ONE:
                first = tl.load(starts + at, mask=inside, other=0)
            own = ups + slot * K * width
            wide = _raised(z + row * z_stride, first, own, width, at, inside, K, BLOCK)
            value = (value.to(tl.float32) + wide).to(y.dtype.element_ty)
    value += before
    tl.store(total + row * width + at, value, mask=inside)
    value = value.to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    tl.store(out + row * width + at, (value * factor * scale).to(out.dtype.element_ty), mask=inside)


def normed(x: Tensor, added: Added, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `one_token.normed`; x contiguous."""
    rows, width = x.shape
    total, out = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _normed[(rows,)](
        x, added.y, *_more(added), weight, total, out, width, added.y.stride(0),
        0 if added.z is None else added.z.stride(0), eps,
        K=_lows(added), ONE=added.ups is None or len(added.ups.spans) == 1,
        BLOCK=block, num_warps=min(16, max(1, block // 256)), **_launch(x.device),
    )  # fmt: skip
    return total, out


@triton.jit
def _activated(  # type: ignore[no-untyped-def]
    y, z, ups, starts, slots, out, half, y_stride, z_stride,
    K: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr, ROOT: tl.constexpr,
    CUBE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    _begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < half
    gate = tl.load(y + row * y_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(y + row * y_stride + half + at, mask=inside, other=0.0).to(tl.float32)
    if K:
        slot = tl.load(slots + row).to(tl.int64)
        first, second = tl.load(starts), tl.load(starts + half)
        if slot >= 0:
            z, own, width = z + row * z_stride, ups + slot * K * 2 * half, 2 * half
            gate += _raised(z, first, own, width, at, inside, K, BLOCK)
            up += _raised(z, second, own, width, half + at, inside, K, BLOCK)
    if GELU:  # ½ (1 + tanh t) = σ(2t)
        value = gate * tl.sigmoid(2.0 * ROOT * gate * (1.0 + CUBE * gate * gate)) * up
    else:
        value = gate * tl.sigmoid(gate) * up
    tl.store(out + row * half + at, value.to(out.dtype.element_ty), mask=inside)


def activated(added: Added, activation: Activation) -> Tensor:
    """See `one_token.activated`."""
    rows, half = len(added.y), added.y.shape[1] // 2
    out = added.y.new_empty(rows, half)
    block = 128 if rows * half <= 2**15 else _BLOCK
    _activated[(rows, triton.cdiv(half, block))](
        added.y, *_more(added), out, half, added.y.stride(0),
        0 if added.z is None else added.z.stride(0),
        K=_lows(added), GELU=activation == "gelu_tanh", BLOCK=block, ROOT=ROOT, CUBE=CUBE,
        num_warps=1 if block == 128 else 4, **_launch(out.device),
    )  # fmt: skip
    return out


@triton.jit
def _put_by(  # type: ignore[no-untyped-def]
    y, z, ups, starts, slots, cos, sin, places, queries, keys, values,
    y_stride, z_stride, width, heads, key_heads, row_stride, head_stride,
    K: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
    PAIRS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    _begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    y += row * y_stride
    z += row * z_stride
    slot = tl.load(slots + row).to(tl.int64)
    place = tl.load(places + row).to(tl.int64)
    at = head * DIM + column
    value = tl.load(y + at, mask=inside, other=0.0)
    other, partner, first = value, column, column < HALF
    if HALF:
        if PAIRS:
            partner, angle, first = column ^ 1, column // 2, column % 2 == 0
        else:
            partner = tl.where(first, column + HALF, column - HALF)
            angle = tl.where(first, column, column - HALF)
        turns = column < tl.where(head < heads + key_heads, 2 * HALF, 0)
        partner = tl.where(turns, partner, column)
        other = tl.load(y + head * DIM + partner, mask=inside, other=0.0)
        c = tl.load(cos + place * HALF + angle, mask=turns, other=1.0)
        s = tl.load(sin + place * HALF + angle, mask=turns, other=0.0)
    if K:  # rounded as memory would have them
        low = tl.load(starts + head * DIM)
        if slot >= 0:
            own = ups + slot * K * width
            wide = _raised(z, low, own, width, at, inside, K, BLOCK)
            value = (value.to(tl.float32) + wide).to(y.dtype.element_ty)
            if HALF:
                beside = head * DIM + partner
                wide = _raised(z, low, own, width, beside, inside, K, BLOCK)
                other = (other.to(tl.float32) + wide).to(y.dtype.element_ty)
    value = value.to(tl.float32)
    if HALF:
        other = other.to(tl.float32)
        value = value * c + tl.where(first, -other, other) * s
    if head < heads:
        target = queries + row * heads * DIM + head * DIM
        tl.store(target + column, value.to(queries.dtype.element_ty), mask=inside)
    else:
        number = head - heads
        if number < key_heads:
            target = keys + row * row_stride + number * head_stride + place * DIM
            tl.store(target + column, value.to(keys.dtype.element_ty), mask=inside)
        else:
            target = values + row * row_stride + (number - key_heads) * head_stride + place * DIM
            tl.store(target + column, value.to(values.dtype.element_ty), mask=inside)


def put_by(
    added: Added,
    turned: Turn | None,
    places: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    heads: int,
) -> Tensor:
    """See `one_token.put_by`; keys and values contiguous."""
    rows, (key_heads, dim) = len(added.y), (keys.shape[1], keys.shape[3])
    queries = added.y.new_empty(rows, heads * dim)
    cos, sin = (queries, queries) if turned is None else (turned.cos, turned.sin)
    _put_by[(rows, heads + 2 * key_heads)](
        added.y, *_more(added), cos, sin, places, queries, keys, values,
        added.y.stride(0), 0 if added.z is None else added.z.stride(0), added.y.shape[1],
        heads, key_heads, keys.stride(0), keys.stride(1),
        K=_lows(added), DIM=dim, BLOCK=triton.next_power_of_2(dim),
        HALF=0 if turned is None else turned.cos.shape[1],
        PAIRS=turned is not None and turned.pairs, num_warps=1, **_launch(queries.device),
    )  # fmt: skip
    return queries


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, keys, values, places, out, part, lse, row_stride, head_stride, scale, cap, window,
    GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    STEP: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    LOG2_E: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Queries of one group of heads over one part of what a row keeps."""
    _begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    group, groups = tl.program_id(1), tl.num_programs(1)
    split = tl.program_id(2)
    length = tl.load(places + row) + 1
    low = 0
    if WINDOW:
        low = tl.maximum(0, length - window)
    share = tl.cdiv(tl.cdiv(length - low, SPLITS), STEP) * STEP
    begin = low + split * share
    end = tl.minimum(length, begin + share)
    member = tl.arange(0, PADDED)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    head = row * groups * GROUP + group * GROUP + member
    mine = (member < GROUP) & (column < DIM)
    queries = tl.load(q + head * DIM + column, mask=mine, other=0.0)
    keys += row * row_stride + group * head_stride
    values += row * row_stride + group * head_stride
    total = tl.zeros([PADDED, WIDTH], tl.float32)
    norm = tl.zeros([PADDED], tl.float32)
    peak = tl.full([PADDED], float("-inf"), tl.float32)
    for first in range(begin, end, STEP):
        at = first + tl.arange(0, STEP)
        there = (at[:, None] < end) & (column < DIM)
        k = tl.load(keys + at[:, None] * DIM + column, mask=there, other=0.0)
        v = tl.load(values + at[:, None] * DIM + column, mask=there, other=0.0)
        score = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        if CAP:
            score = cap * (2.0 * tl.sigmoid(2.0 * score / cap) - 1.0)
        score = tl.where(at[None, :] < end, score * LOG2_E, float("-inf"))
        top = tl.maximum(peak, tl.max(score, axis=1))
        p = tl.exp2(score - top[:, None])
        shrink = tl.exp2(peak - top)
        norm = norm * shrink + tl.sum(p, axis=1)
        total = total * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        peak = top
    if SPLITS == 1:
        tl.store(
            out + head * DIM + column, (total / norm[:, None]).to(out.dtype.element_ty), mask=mine
        )
    else:
        number = tl.arange(0, PADDED)
        own = (row * groups * GROUP + group * GROUP + number) * SPLITS + split
        some = norm > 0
        tl.store(
            lse + own, tl.where(some, peak + tl.log2(norm), float("-inf")), mask=number < GROUP
        )
        value = total / tl.where(some, norm, 1.0)[:, None]
        tl.store(part + own[:, None] * DIM + column, value, mask=mine)


@triton.jit
def _joined(  # type: ignore[no-untyped-def]
    part, lse, out, SPLITS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    _begin(EARLY)
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, WIDTH)
    weight = tl.load(lse + head * SPLITS + split)
    weight = tl.exp2(weight - tl.max(weight, axis=0))
    weight /= tl.sum(weight, axis=0)
    places = part + (head * SPLITS + split[:, None]) * DIM + column[None, :]
    value = tl.load(places, mask=column[None, :] < DIM, other=0.0)
    value = tl.sum(value * weight[:, None], axis=0)
    tl.store(out + head * DIM + column, value.to(out.dtype.element_ty), mask=column < DIM)


def splits_for(programs: int, length: int) -> int:
    """Into how many parts, a power of two, what each row keeps is cut, so that the card is busy."""
    most = min(64, triton.next_power_of_2(triton.cdiv(length, _KEYS)))
    return max(1, min(most, triton.next_power_of_2(triton.cdiv(_PROGRAMS, programs))))


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Tensor,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """See `one_token.attend`; keys and values contiguous."""
    rows, (_, groups, length, dim) = len(q), keys.shape
    heads = q.shape[1] // dim
    splits = splits_for(rows * groups, length)
    out = torch.empty_like(q)
    part, lse = out, out
    if splits > 1:
        part = torch.empty(rows * heads * splits * dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(rows * heads * splits, dtype=torch.float32, device=q.device)
    _attend[(rows, groups, splits)](
        q, keys, values, places, out, part, lse, keys.stride(0), keys.stride(1),
        scaling, softcap or 0.0, window or 0,
        GROUP=heads // groups, PADDED=max(16, triton.next_power_of_2(heads // groups)),
        DIM=dim, WIDTH=max(16, triton.next_power_of_2(dim)), STEP=_KEYS, SPLITS=splits,
        WINDOW=window is not None, CAP=softcap is not None, LOG2_E=LOG2_E, **_launch(q.device),
    )  # fmt: skip
    if splits > 1:
        _joined[(rows * heads,)](
            part, lse, out, SPLITS=splits, DIM=dim, WIDTH=triton.next_power_of_2(dim), num_warps=2,
            **_launch(q.device),
        )  # fmt: skip
    return out


@triton.jit
def _row_product(  # type: ignore[no-untyped-def]
    h, weight, bias, out, rows, width, stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    own = weight + row.to(tl.int64)[:, None] * stride
    at = tl.arange(0, BLOCK)
    w = tl.load(own + at[None, :], mask=there[:, None] & (at < width)[None, :], other=0.0)
    _begin(EARLY)  # W is nobody's output
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        x = tl.load(h + first + at, mask=first + at < width, other=0.0).to(tl.float32)
        later = first + BLOCK + at
        next_w = tl.load(
            own + later[None, :], mask=there[:, None] & (later < width)[None, :], other=0.0
        )
        total += w.to(tl.float32) * x[None, :]
        w = next_w
    value = tl.sum(total, axis=1)
    if BIAS:
        value += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row, value.to(out.dtype.element_ty), mask=there)


def row_product(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """h Wᵀ + b of a single row, [1, out]: as fast as W is read."""
    rows, width = weight.shape
    out = h.new_empty(1, rows)
    block, warps = (2048, 2) if width >= 1024 else (1024, 4)
    _row_product[(triton.cdiv(rows, _OUTPUTS),)](
        h, weight, weight if bias is None else bias, out, rows, width, weight.stride(0),
        ROWS=_OUTPUTS, BLOCK=block, BIAS=bias is not None, num_warps=warps, **_launch(h.device),
    )  # fmt: skip
    return out


def _launch(device: torch.device) -> dict[str, bool]:
    """How a kernel is launched; see the module."""
    early = EARLY and _can_be_early(device)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@cache
def _can_be_early(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device)[0] >= 9
    )


def _lows(added: Added) -> int:
    """k; 0 where nothing is to be added."""
    return 0 if added.z is None or added.ups is None else added.ups.matrix.shape[1]


def _more(added: Added) -> tuple[Any, ...]:
    """z, U, the starts and the slots; y in their places where nothing is to be added."""
    if added.z is None or added.ups is None:
        return (added.y,) * 4
    return added.z, added.ups.matrix, added.ups.starts, added.slot
