"""Causal attention over packed rows as Triton kernels, by FlashAttention-2 (arXiv 2307.08691).

With q_i, k_j of one segment, s_ij = scaling · q_i·k_j for j ≤ i, P = softmax(s) by rows, O = P V:

    lse_i = log Σ_j exp s_ij                  δ_i  = dO_i · O_i
    dS    = P ∘ (dO Vᵀ − δ)                   dQ   = scaling · dS K
    dK    = scaling · dSᵀ Q                   dV   = Pᵀ dO

With a soft cap, s_ij = c tanh(scaling · q_i·k_j / c), and dS gets a factor of 1 − tanh². With sinks, a logit
σ a head stands in the softmax and gives nothing: lse_i = log(exp σ + Σ_j exp s_ij), and all else is as it was.

No score leaves the chip: the backward pass computes P again from `lse`. Each program writes its own
tile of the result and nobody else's, so that sums have one order and every run gives the same bits.

In trees (`engine/segments.py`) key j is seen by the queries j ≤ i < reach_j of its segment, one comparison
more for each score; which blocks are visited is said in `trees.py`. So it is with a window of w: i - j < w;
blocks that lie before it are not visited at all. In a tree a window counts ancestors:
depth_i − depth_j < w.

A program's tile comes from a table (`tiles.tile_table`). Rows of the table whose first position is
-1 end at once: a fixed grid, as CUDA graphs need it, serves any segments. **Positions that no tile
covers are never written**; whoever needs them to be zero covers them with segments.

Queries and keys come rotated (`rotary.py`): turning them here, for every program that reads them,
takes longer than turning them once. Their gradients can be turned back by −θ while they are still
in float32 registers, once a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Inside the kernels WIDTH is D padded to what tl.dot takes.


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    pointer, first, limit, stride,
    ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[ROWS, WIDTH] from row `first`; zeros from row `limit` (if MASKED) and from column DIM on.

    What lies behind `limit` belongs to a neighbour and may be infinite; it must not even meet a
    weight of zero.
    """
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    # Only the tile's first row can lie beyond 2^31 elements; the way inside the tile is short.
    places = pointer + tl.cast(first, tl.int64) * stride + (rows * stride + columns)
    if MASKED:
        inside = rows < limit - first
        if DIM != WIDTH:
            inside = inside & (columns < DIM)
        values = tl.load(places, mask=inside, other=0.0)
    elif DIM != WIDTH:
        values = tl.load(places, mask=columns < DIM, other=0.0)
    else:
        values = tl.load(places)
    return values


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    pointer, first, limit, stride, values,
    ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    places = pointer + tl.cast(first, tl.int64) * stride + (rows * stride + columns)
    inside = rows < limit - first
    if DIM != WIDTH:
        inside = inside & (columns < DIM)
    tl.store(places, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _store_turned_back(  # type: ignore[no-untyped-def]
    pointer, first, limit, stride, values, cos, sin, angle_stride,
    ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """With TURN, a gradient [d₁, d₂] of rotated heads as that of the heads before: turned by −θ."""
    if TURN:
        HALF: tl.constexpr = DIM // 2
        c = _load(cos, first, limit, angle_stride, ROWS, HALF, HALF, True)
        s = _load(sin, first, limit, angle_stride, ROWS, HALF, HALF, True)
        one, two = tl.split(tl.permute(tl.reshape(values, (ROWS, 2, HALF)), (0, 2, 1)))
        _store(pointer, first, limit, stride, one * c + two * s, ROWS, HALF, HALF)
        _store(pointer + HALF, first, limit, stride, two * c - one * s, ROWS, HALF, HALF)
    else:
        _store(pointer, first, limit, stride, values, ROWS, DIM, WIDTH)


@triton.jit
def _tanh(scores, squeeze):  # type: ignore[no-untyped-def]
    """tanh(scaling · scores / c) with squeeze = 2 log2 e · scaling / c; where 2^x is infinite, 1."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(scores * squeeze))


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    total, norm, peak, q, queries, keys, values, stride, reach, depth, first, limit, scale, squeeze,
    STEP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    TREES: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Takes STEP keys from `first` on into the running softmax (algorithm 1, lines 8 to 10)."""
    k = _load(keys, first, limit, stride, STEP, DIM, WIDTH, CAUSAL)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if CAP:
        scores = _tanh(scores, squeeze)
    positions = first + tl.arange(0, STEP)
    if CAUSAL:  # keys behind the segment's end lie behind all of its queries, too
        scores = tl.where(positions[None, :] <= queries[:, None], scores, float("-inf"))
    if TREES:
        reaches = tl.load(reach + positions, mask=positions < limit, other=0)
        # Queries behind the end, which are never stored, see what the last one sees, not nothing.
        seen = tl.minimum(queries, limit - 1)[:, None] < reaches[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    if WINDOW:
        before, own = positions, queries
        if TREES:
            before = tl.load(depth + positions, mask=positions < limit, other=0)
            own = tl.load(depth + tl.minimum(queries, limit - 1))
        scores = tl.where(own[:, None] - before[None, :] < WINDOW, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    level = new_peak
    if WINDOW or TREES:  # a query may see none of the first keys: −∞ − (−∞) is no number
        level = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores * scale - level[:, None])
    kept = tl.exp2(peak - level)
    v = _load(values, first, limit, stride, STEP, DIM, WIDTH, CAUSAL)
    total = tl.dot(weights.to(v.dtype), v, total * kept[:, None], input_precision="ieee")
    norm = norm * kept + tl.sum(weights, 1)
    return total, norm, new_peak


@triton.jit
def _window_begin(start, first, STEP: tl.constexpr, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """The block, counted from the segment's start, of the first key that the query at `first` sees."""
    return start + tl.maximum(first - WINDOW + 1 - start, 0) // STEP * STEP


@triton.jit(do_not_specialize=["count"])
def attention_forward_kernel(  # type: ignore[no-untyped-def]
    qkv, stride, tiles, reach, above, depth, sinks, out, out_stride, lse, count, scale, squeeze,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    STEP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
    TREES: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    # Heads run fastest: those of a group read the same keys while they are in the cache.
    head = tl.program_id(0) % HEADS
    tile = tiles + tl.program_id(0) // HEADS * COLUMNS
    first = tl.load(tile)
    if first < 0:
        return
    start = tl.load(tile + 1)
    end = tl.load(tile + 2)
    group = head // (HEADS // KEY_HEADS)
    keys = qkv + (HEADS + group) * DIM
    values = keys + KEY_HEADS * DIM
    queries = first + tl.arange(0, TILE)
    q = _load(qkv + head * DIM, first, end, stride, TILE, DIM, WIDTH, True)
    total = tl.zeros([TILE, WIDTH], dtype=tl.float32)
    norm = tl.zeros([TILE], dtype=tl.float32)
    peak = tl.full([TILE], float("-inf"), dtype=tl.float32)
    if SINKS:  # the first that every query meets: it weighs 2^(σ − σ) and brings no value
        peak = (
            tl.zeros([TILE], dtype=tl.float32)
            + tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        )
        norm += 1.0
    # Without a window the segment's first key is seen by every query: `peak` is finite from there on.
    begin = start
    if WINDOW:  # noqa: SIM102 – what is known at compile time, one question at a time
        if not TREES:
            begin = _window_begin(start, first, STEP, WINDOW)
    diagonal = begin
    if TREES:
        diagonal = first
    elif SPLIT:
        diagonal = first
        for at in range(begin, first, STEP):
            total, norm, peak = _attend(
                total, norm, peak, q, queries, keys, values, stride, reach, depth, at, end, scale,
                squeeze, STEP, DIM, WIDTH, False, TREES, WINDOW, CAP,
            )  # fmt: skip
    for at in range(diagonal, tl.minimum(first + TILE, end), STEP):
        total, norm, peak = _attend(
            total, norm, peak, q, queries, keys, values, stride, reach, depth, at, end, scale,
            squeeze, STEP, DIM, WIDTH, True, TREES, WINDOW, CAP,
        )  # fmt: skip
    if TREES:
        ancestor = tl.load(above + first)
        while ancestor >= start:
            at = start + (ancestor - start) // STEP * STEP
            total, norm, peak = _attend(
                total, norm, peak, q, queries, keys, values, stride, reach, depth, at, end, scale,
                squeeze, STEP, DIM, WIDTH, False, TREES, WINDOW, CAP,
            )  # fmt: skip
            while ancestor >= at:
                ancestor = tl.load(above + ancestor)
    _store(out + head * DIM, first, end, out_stride, total / norm[:, None], TILE, DIM, WIDTH)
    logs = (peak + tl.log2(norm)) * 0.6931471805599453  # ln 2
    tl.store(lse + head * count + queries, logs, mask=queries < end)


@triton.jit
def _query_gradient(  # type: ignore[no-untyped-def]
    dq, q, dout, logs, delta, queries, keys, values, stride, reach, depth, first, limit, scale,
    squeeze,
    STEP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    TREES: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    k = _load(keys, first, limit, stride, STEP, DIM, WIDTH, CAUSAL)
    v = _load(values, first, limit, stride, STEP, DIM, WIDTH, CAUSAL)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if CAP:
        scores = _tanh(scores, squeeze)
        slope = 1.0 - scores * scores
    positions = first + tl.arange(0, STEP)
    if CAUSAL:
        scores = tl.where(positions[None, :] <= queries[:, None], scores, float("-inf"))
    if TREES:
        reaches = tl.load(reach + positions, mask=positions < limit, other=0)
        scores = tl.where(queries[:, None] < reaches[None, :], scores, float("-inf"))
    if WINDOW:
        before, own = positions, queries
        if TREES:
            before = tl.load(depth + positions, mask=positions < limit, other=0)
            own = tl.load(depth + tl.minimum(queries, limit - 1))
        scores = tl.where(own[:, None] - before[None, :] < WINDOW, scores, float("-inf"))
    weights = tl.exp2(scores * scale - logs[:, None])
    slopes = tl.dot(dout, tl.trans(v), input_precision="ieee")
    slopes = weights * (slopes - delta[:, None])
    if CAP:
        slopes *= slope
    return tl.dot(slopes.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["count"])
def attention_backward_queries_kernel(  # type: ignore[no-untyped-def]
    dout, dout_stride, qkv, stride, cos, sin, angle_stride, tiles, reach, above, depth, out,
    out_stride, lse, terms, dqkv, dqkv_stride, count, scale, squeeze, scaling,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    STEP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
    TURN: tl.constexpr, TREES: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    tile = tiles + tl.program_id(0) // HEADS * COLUMNS
    first = tl.load(tile)
    if first < 0:
        return
    start = tl.load(tile + 1)
    end = tl.load(tile + 2)
    group = head // (HEADS // KEY_HEADS)
    keys = qkv + (HEADS + group) * DIM
    values = keys + KEY_HEADS * DIM
    queries = first + tl.arange(0, TILE)
    do = _load(dout + head * DIM, first, end, dout_stride, TILE, DIM, WIDTH, True)
    o = _load(out + head * DIM, first, end, out_stride, TILE, DIM, WIDTH, True)
    deltas = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    # Queries behind the end weigh nothing: exp2(s − ∞) = 0.
    logs = tl.load(lse + head * count + queries, mask=queries < end, other=float("inf"))
    logs *= 1.4426950408889634  # log2 e: everything below is in powers of two
    # The kernel for keys wants both of every query at once, as pairs: alone, each is so small that
    # every thread would fetch all of it.
    pairs = terms + (head * count + queries) * 2
    tl.store(pairs, logs, mask=queries < end)
    tl.store(pairs + 1, deltas, mask=queries < end)
    q = _load(qkv + head * DIM, first, end, stride, TILE, DIM, WIDTH, True)
    dq = tl.zeros([TILE, WIDTH], dtype=tl.float32)
    begin = start
    if WINDOW:  # noqa: SIM102 – as above
        if not TREES:
            begin = _window_begin(start, first, STEP, WINDOW)
    diagonal = begin
    if TREES:
        diagonal = first
    elif SPLIT:
        diagonal = first
        for at in range(begin, first, STEP):
            dq = _query_gradient(
                dq, q, do, logs, deltas, queries, keys, values, stride, reach, depth, at, end,
                scale, squeeze, STEP, DIM, WIDTH, False, TREES, WINDOW, CAP,
            )  # fmt: skip
    for at in range(diagonal, tl.minimum(first + TILE, end), STEP):
        dq = _query_gradient(
            dq, q, do, logs, deltas, queries, keys, values, stride, reach, depth, at, end, scale,
            squeeze, STEP, DIM, WIDTH, True, TREES, WINDOW, CAP,
        )  # fmt: skip
    if TREES:
        ancestor = tl.load(above + first)
        while ancestor >= start:
            at = start + (ancestor - start) // STEP * STEP
            dq = _query_gradient(
                dq, q, do, logs, deltas, queries, keys, values, stride, reach, depth, at, end,
                scale, squeeze, STEP, DIM, WIDTH, False, TREES, WINDOW, CAP,
            )  # fmt: skip
            while ancestor >= at:
                ancestor = tl.load(above + ancestor)
    _store_turned_back(
        dqkv + head * DIM, first, end, dqkv_stride, dq * scaling, cos, sin, angle_stride,
        TILE, DIM, WIDTH, TURN,
    )  # fmt: skip


@triton.jit
def _key_gradient(  # type: ignore[no-untyped-def]
    dk, dv, k, v, positions, reaches, before, visit, head, first, limit, dout, dout_stride, qkv,
    stride, depth, terms, count, scale, squeeze,
    SHARE: tl.constexpr, STEP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr, TREES: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One query head of the group over one block of queries; scores stand transposed.

    `reaches` and `before`, the depths of the keys, are read with TREES.
    """
    at = first + visit // SHARE * STEP
    head += visit % SHARE
    queries = at + tl.arange(0, STEP)
    q = _load(qkv + head * DIM, at, limit, stride, STEP, DIM, WIDTH, True)
    do = _load(dout + head * DIM, at, limit, dout_stride, STEP, DIM, WIDTH, True)
    # Behind the end all is zero and adds nothing: 2^(0 − 0) times a dO of 0, and slopes of 1 · (0 − 0).
    pairs = terms + (head * count + queries)[:, None] * 2 + tl.arange(0, 2)[None, :]
    logs, deltas = tl.split(tl.load(pairs, mask=(queries < limit)[:, None], other=0.0))
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    if CAP:
        scores = _tanh(scores, squeeze)
        slope = 1.0 - scores * scores
    if CAUSAL:
        scores = tl.where(positions[:, None] <= queries[None, :], scores, float("-inf"))
    if TREES:
        scores = tl.where(queries[None, :] < reaches[:, None], scores, float("-inf"))
    if WINDOW:
        own = queries
        if TREES:
            own = tl.load(depth + queries, mask=queries < limit, other=0)
        scores = tl.where(own[None, :] - before[:, None] < WINDOW, scores, float("-inf"))
    weights = tl.exp2(scores * scale - logs[None, :])
    dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
    slopes = tl.dot(v, tl.trans(do), input_precision="ieee")
    slopes = weights * (slopes - deltas[None, :])
    if CAP:
        slopes *= slope
    dk = tl.dot(slopes.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["count"])
def attention_backward_keys_kernel(  # type: ignore[no-untyped-def]
    dout, dout_stride, qkv, stride, cos, sin, angle_stride, tiles, terms, dqkv, dqkv_stride, count,
    scale, squeeze, scaling,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    STEP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
    TURN: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) % KEY_HEADS
    tile = tiles + tl.program_id(0) // KEY_HEADS * COLUMNS
    first = tl.load(tile)
    if first < 0:
        return
    end = tl.load(tile + 2)
    SHARE: tl.constexpr = HEADS // KEY_HEADS
    key_place = (HEADS + group) * DIM
    value_place = key_place + KEY_HEADS * DIM
    positions = first + tl.arange(0, TILE)
    k = _load(qkv + key_place, first, end, stride, TILE, DIM, WIDTH, True)
    v = _load(qkv + value_place, first, end, stride, TILE, DIM, WIDTH, True)
    dk = tl.zeros([TILE, WIDTH], dtype=tl.float32)
    dv = tl.zeros([TILE, WIDTH], dtype=tl.float32)
    # Blocks of queries and heads of the group in one loop: the loads of a head run while the one
    # before is multiplied, although a short segment has one or two blocks. The heads run fastest,
    # so that the blocks on the diagonal come first.
    last = end
    if WINDOW:  # the tile's last key is seen by no query from here on
        last = tl.minimum(end, first + TILE - 1 + WINDOW)
    visits = tl.cdiv(last - first, STEP) * SHARE
    masked = visits
    if SPLIT:
        masked = tl.minimum(visits, TILE // STEP * SHARE)
    for visit in range(masked):
        dk, dv = _key_gradient(
            dk, dv, k, v, positions, positions, positions, visit, group * SHARE, first, end, dout,
            dout_stride, qkv, stride, terms, terms, count, scale, squeeze, SHARE, STEP, DIM, WIDTH,
            True, False, WINDOW, CAP,
        )  # fmt: skip
    if SPLIT:
        for visit in range(masked, visits):
            dk, dv = _key_gradient(
                dk, dv, k, v, positions, positions, positions, visit, group * SHARE, first, end,
                dout, dout_stride, qkv, stride, terms, terms, count, scale, squeeze, SHARE, STEP,
                DIM, WIDTH, False, False, WINDOW, CAP,
            )  # fmt: skip
    _store(dqkv + value_place, first, end, dqkv_stride, dv, TILE, DIM, WIDTH)
    _store_turned_back(
        dqkv + key_place, first, end, dqkv_stride, dk * scaling, cos, sin, angle_stride,
        TILE, DIM, WIDTH, TURN,
    )  # fmt: skip
