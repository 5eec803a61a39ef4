"""The first half of a decoder layer, one autograd function: forward, backward, and its bytes.

    x' = x + δ(o),   o' = O(attention(QKV(before x')))

A block takes the residual stream x and the output o of the block before, and returns both anew, so that each
addition, and the norm and the multiplier by which δ follows from o, happen inside the next norm's kernel
(`kernels/stream.py`). Written by hand rather than left to
autograd because of what it saves: weights are frozen, so most inputs are needed by nobody; and what
is needed can be dropped and computed again (`Keep`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_lora_cli.engine.attention import attend, attend_gradient, kernels_know
from mtl_lora_cli.engine.halves import AttentionHalf
from mtl_lora_cli.engine.heads import HeadLayout
from mtl_lora_cli.engine.plan import AttentionPlan
from mtl_lora_cli.engine.saved import (
    Keep,
    Pass,
    Saved,
    both_gradients,
    entry_of,
    opened,
    spread_out,
)
from mtl_lora_cli.engine.sizes import LayerSizes, Load, ModelSizes


class AttentionBlock(torch.autograd.Function):
    """x' = x + δ(o) and o' = O(attention(QKV(before x'))).

    Args of `apply`: the layer's half, the pass, x [N, d], o [N, d] or None, then the tensors of the
    groups QKV and O. Returns x' and o', [N, d] or, with `positions`, [U, d].
    """

    @staticmethod
    def forward(
        ctx: Any,
        half: AttentionHalf,
        call: Pass,
        x: Tensor,
        before: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        assert call.packing is not None
        count, packing = half.qkv.count, call.packing.of_layer(half.sinks)
        entry, h = half.begin.forward_for(half.qkv, x, before)
        qkv, qkv_tape = half.qkv.forward(h, tensors[:count], call.slots, call.training)
        ready = packing.ready(half.layout.apart(qkv), half.heads)
        if call.told is not None:
            call.told(ready)
        o_room = half.o.room.columns
        attended, state = attend(ready, packing, learn=call.learn, room=o_room)
        chosen, residual = half.layout.gated(attended, qkv), entry.total
        if call.positions is not None:
            chosen, residual = chosen[call.positions], residual[call.positions]
        out, o_tape = half.o.forward(chosen, tensors[count:], call.chosen_slots, call.training)
        if call.learn:
            saved = Saved(ctx)
            saved.add_entry(entry)
            if call.keep.qkv:
                saved.add("qkv", qkv)
                # Of a graph the state holds all that would be computed again.
                if call.keep.attended or not isinstance(state, Tensor):
                    saved.add("attended", attended)
            saved.add_tape("tape_qkv", qkv_tape)
            saved.add_tape("tape_o", o_tape)
            saved.close()
            ctx.state = state if call.keep.qkv else None
            ctx.static = (half, call)
        return residual, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dresidual: Tensor, dout: Tensor) -> tuple[Any, ...]:
        half, call = ctx.static
        packing, slots = call.packing.of_layer(half.sinks), call.slots
        saved = opened(ctx)
        entry, state = entry_of(saved), ctx.state
        qkv_tape, o_tape = saved.get("tape_qkv"), saved.get("tape_o")
        qkv, attended = saved.get("qkv"), saved.get("attended")
        if qkv is None:
            h = half.begin.again_for(half.qkv, entry)
            qkv = half.qkv.again(h, qkv_tape, slots)
            heads = half.layout.apart(qkv)
            ready = packing.ready(heads, half.heads)
        elif half.heads is None and half.layout.plain:
            ready = heads = qkv
        else:  # what the norms were given was kept, and they are as cheap as a copy
            heads = half.layout.apart(qkv)
            ready = state[0] if isinstance(state, tuple) else packing.ready(heads, half.heads)
        if attended is None:
            attended, state = attend(ready, packing, learn=True)
        attended = half.o.input(attended)
        chosen = half.layout.gated(attended, qkv)
        chosen = chosen if call.positions is None else chosen[call.positions]
        handed, roomy = half.end.take(dout)
        dchosen, o_gradients = half.o.backward(handed, o_tape, call.chosen_slots, True, roomy=roomy)
        o_found = half.o.finish(o_gradients, o_tape, chosen)
        dattended = spread_out(dchosen, call.positions, attended)
        dattended, dgates = half.layout.gate_gradient(dattended, attended, qkv)
        room = half.qkv.room.rows
        dqkv = attend_gradient(dattended, ready, attended, state, packing, room=room)
        if half.layout.plain:
            given = packing.gradient_for(half.qkv.form, dqkv, heads, half.heads)
        else:
            packing.gradient_(dqkv, heads, half.heads)
            given = half.layout.gradient(dqkv, dgates, qkv, room=room)
        ctx.state = state = None
        wanted = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        dh, qkv_gradients = half.qkv.backward(given, qkv_tape, slots, wanted, roomy=True)
        qkv_found = half.qkv.finish(qkv_gradients, qkv_tape, entry.total, half.begin.normed(entry))
        both = None
        if wanted:
            dresidual = spread_out(dresidual, call.positions, entry.total)
            both = half.begin.gradient(dh, dresidual, entry)
        return (None, None, *both_gradients(ctx, both, 2), *qkv_found, *o_found)


def kept_bytes(sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool) -> int:
    """What the block leaves for its backward pass.

    A position: total d, qkv (H + 2G) D, attended H D in `dtype`, 1/rms in float32, and, with qkv,
    attention's log-sum-exp, H float32; where the layer before leaves an output that is normed here, that
    output d and another 1/rms. What stands behind attention has U positions in the last layer. torch's
    graph holds its result and log-sum-exp; q, k and v of each segment are views of what it was given,
    which is qkv itself, or its copy with normed heads.
    """
    value, width, plan = sizes.value, layer.qkv.inputs, _plan(layer)
    each = width * value + (4 if plan.before else 0)
    if keep.qkv:
        each += layer.qkv.outputs * value + 4 * plan.heads
        if keep.attended or not _kernels(sizes, layer):
            each += sizes.input_width(layer.o) * value
        if _graph(sizes, layer):
            each += layer.o.inputs * value
            copied = plan.q_norm is not None or not HeadLayout.of(plan).plain
            each += plan.width * value if copied else 0
    if layer.norms_before:
        each += width * value + 4
    asked = load.asked if last else load.positions
    tapes = sizes.tape(layer.qkv, load.positions) + sizes.tape(layer.o, asked)
    return each * load.positions + tapes


def forward_bytes(
    sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool
) -> int:
    """The most that lives beside what is kept, in the forward pass."""
    plan = _plan(layer)
    each = 2 * layer.qkv.inputs + sizes.input_width(layer.qkv)
    if not keep.qkv:
        each += layer.qkv.outputs + layer.o.inputs
    elif not keep.attended:
        each += layer.o.inputs
    if plan.q_norm and not (_graph(sizes, layer) and keep.qkv):
        each += plan.width  # heads before their norms, or behind them
    each += _apart(plan)
    return each * sizes.value * load.positions + _scores(sizes, layer, load)


def backward_bytes(
    sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool
) -> int:
    """The most that lives beside what is kept, in the backward pass.

    The gradients of x and δ, of attended H D, of [q | k | v], of the input, of x; what is computed
    again.
    """
    value, width, plan = sizes.value, layer.qkv.inputs, _plan(layer)
    again = 0 if keep.qkv else width + layer.qkv.outputs
    again += 0 if keep.qkv and keep.attended else layer.o.inputs
    if plan.q_norm and not (_graph(sizes, layer) and keep.qkv):
        again += plan.width
    again += _apart(plan)
    each = 4 * width + again + 2 * layer.o.inputs + layer.qkv.outputs
    if not _kernels(sizes, layer):  # torch's gradients, part by part
        each += 2 * layer.qkv.outputs + layer.o.inputs
    sums = 0  # of trees' keys and values, `kernels/trees.py`
    if load.trees and _kernels(sizes, layer):
        sums = 2 * plan.key_heads * plan.head_dim
    found = (each * value + 4 * plan.heads + sums) * load.positions + _scores(sizes, layer, load)
    if not sizes.kernels:  # the norms' gradient is made in float32, term by term
        found = max(found, (4 * width * value + 20 * width) * load.positions)
        if plan.q_norm:
            beside = (3 * width + again + 2 * layer.qkv.outputs) * value
            found = max(found, (beside + 20 * plan.heads * plan.head_dim) * load.positions)
    return found


def _apart(plan: AttentionPlan) -> int:
    """Values a position of what is made of the projections' outputs before attention, and of its gated result."""
    layout = HeadLayout.of(plan)
    return 0 if layout.plain else plan.width + (plan.heads * plan.head_dim if plan.gates else 0)


def _plan(layer: LayerSizes) -> AttentionPlan:
    assert isinstance(layer.plan.attention, AttentionPlan)
    return layer.plan.attention


def _kernels(sizes: ModelSizes, layer: LayerSizes) -> bool:
    return sizes.kernels and kernels_know(_plan(layer))


def _graph(sizes: ModelSizes, layer: LayerSizes) -> bool:
    """Whether torch keeps a graph of attention; from the scores themselves it computes again instead."""
    return not _kernels(sizes, layer) and _bare(layer)


def _bare(layer: LayerSizes) -> bool:
    """Whether torch's own attention knows what becomes of the scores."""
    return _plan(layer).softcap is None and _plan(layer).sinks is None


def _scores(sizes: ModelSizes, layer: LayerSizes, load: Load) -> int:
    """Scores of one segment in float32: before and behind tanh or beside sinks, their shares, a gradient."""
    if _kernels(sizes, layer) or _bare(layer):
        return 0
    return 4 * 4 * _plan(layer).heads * load.segment**2
