"""The first half of a LLaMA decoder layer, one autograd function.

    x' = x + δ,   δ' = O(attention(QKV(norm x')))

A block takes the residual stream x and what the block before has yet to add to it (δ), and returns
both anew, so that each addition happens inside a norm's kernel. Written by hand rather than left to
autograd because of what it saves: weights are frozen, so most inputs are needed by nobody; and what
is needed can be dropped and computed again (`Keep`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_lora_cli.engine.attention import attend, attend_gradient
from mtl_lora_cli.engine.group import Group
from mtl_lora_cli.engine.saved import Pass, Saved, both_gradients, opened, spread_out
from mtl_lora_cli.kernels.norm import add_norm, apply_norm, norm_gradient


class AttentionBlock(torch.autograd.Function):
    """x' = x + δ and δ' = O(attention(QKV(norm x'))).

    Args of `apply`: norm (weight, ε), the groups QKV and O, the pass, x [N, d], δ [N, d] or None,
    then the tensors of both groups. Returns x' and δ', [N, d] or, with `positions`, [U, d].
    """

    @staticmethod
    def forward(
        ctx: Any,
        norm: tuple[Tensor, float],
        qkv_group: Group,
        o_group: Group,
        call: Pass,
        x: Tensor,
        delta: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        count = qkv_group.count
        total, normed, inverse = add_norm(x, delta, *norm, room=qkv_group.room.columns)
        qkv, qkv_tape = qkv_group.forward(normed, tensors[:count], call.slots, call.training)
        call.packing.rotate_(qkv)
        o_room = o_group.room.columns
        attended, state = attend(qkv, call.packing, learn=call.learn, room=o_room)
        chosen, residual = attended, total
        if call.positions is not None:
            chosen, residual = attended[call.positions], total[call.positions]
        out, o_tape = o_group.forward(chosen, tensors[count:], call.chosen_slots, call.training)
        if call.learn:
            saved = Saved(ctx)
            saved.add("total", total)
            saved.add("inverse", inverse)
            if call.keep.qkv:
                saved.add("qkv", qkv)
                # Of a graph the state holds all that would be computed again.
                if call.keep.attended or not isinstance(state, Tensor):
                    saved.add("attended", attended)
            saved.add_tape("tape_qkv", qkv_tape)
            saved.add_tape("tape_o", o_tape)
            saved.close()
            ctx.state = state if call.keep.qkv else None
            ctx.static = (norm[0], qkv_group, o_group, call)
        return residual, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dresidual: Tensor, dout: Tensor) -> tuple[Any, ...]:
        weight, qkv_group, o_group, call = ctx.static
        saved = opened(ctx)
        total, inverse, state = saved["total"], saved["inverse"], ctx.state
        qkv_tape, o_tape = saved.get("tape_qkv"), saved.get("tape_o")
        qkv, attended = saved.get("qkv"), saved.get("attended")
        if qkv is None:
            normed = apply_norm(total, inverse, weight, room=qkv_group.room.columns)
            qkv = call.packing.rotate_(qkv_group.again(normed, qkv_tape, call.slots))
        if attended is None:
            attended, state = attend(qkv, call.packing, learn=True)
        attended = o_group.input(attended)
        chosen = attended if call.positions is None else attended[call.positions]
        dchosen, o_gradients = o_group.backward(dout, o_tape, call.chosen_slots, True, roomy=False)
        o_found = o_group.finish(o_gradients, o_tape, chosen)
        dattended = spread_out(dchosen, call.positions, attended)
        room = qkv_group.room.rows
        dqkv = attend_gradient(dattended, qkv, attended, state, call.packing, room=room)
        ctx.state = state = None
        wanted = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        dnormed, qkv_gradients = qkv_group.backward(dqkv, qkv_tape, call.slots, wanted, roomy=True)
        qkv_found = qkv_group.finish(qkv_gradients, qkv_tape, total, (inverse, weight))
        dx = None
        if wanted:
            dresidual = spread_out(dresidual, call.positions, total)
            dx = norm_gradient(dnormed, dresidual, total, inverse, weight)
        return (None, None, None, None, *both_gradients(ctx, dx, 4), *qkv_found, *o_found)
