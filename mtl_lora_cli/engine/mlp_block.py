"""The second half of a LLaMA decoder layer, one autograd function; see `attention_block.py`.

x' = x + δ,   δ' = D(silu(G norm x') ⊙ (U norm x'))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_lora_cli.engine.group import Group
from mtl_lora_cli.engine.saved import Pass, Saved, both_gradients, opened
from mtl_lora_cli.kernels.norm import add_norm, apply_norm, norm_gradient
from mtl_lora_cli.kernels.swiglu import swiglu, swiglu_gradient


class MlpBlock(torch.autograd.Function):
    """x' = x + δ and δ' = D(silu(G h) ⊙ (U h)) with h = norm x'.

    Args of `apply`: norm (weight, ε), the groups GU and D, the pass, x and δ [M, d], then the
    tensors of both groups. Returns x' and δ' [M, d]; M is N, or U in the last layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        norm: tuple[Tensor, float],
        gate_up_group: Group,
        down_group: Group,
        call: Pass,
        x: Tensor,
        delta: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        count, slots = gate_up_group.count, call.chosen_slots
        total, normed, inverse = add_norm(x, delta, *norm, room=gate_up_group.room.columns)
        both, gate_up_tape = gate_up_group.forward(normed, tensors[:count], slots, call.training)
        activated = swiglu(both, room=down_group.room.columns)
        out, down_tape = down_group.forward(activated, tensors[count:], slots, call.training)
        if call.learn:
            saved = Saved(ctx)
            saved.add("total", total)
            saved.add("inverse", inverse)
            if call.keep.gate_up:
                saved.add("both", both)
            saved.add_tape("tape_gate_up", gate_up_tape)
            saved.add_tape("tape_down", down_tape)
            saved.close()
            ctx.static = (norm[0], gate_up_group, down_group, slots)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dout: Tensor) -> tuple[Any, ...]:
        weight, gate_up_group, down_group, slots = ctx.static
        saved = opened(ctx)
        total, inverse = saved["total"], saved["inverse"]
        gate_up_tape, down_tape = saved.get("tape_gate_up"), saved.get("tape_down")
        both = saved.get("both")
        if both is None:
            normed = apply_norm(total, inverse, weight, room=gate_up_group.room.columns)
            both = gate_up_group.again(normed, gate_up_tape, slots)
        dactivated, down_gradients = down_group.backward(dout, down_tape, slots, True, roomy=False)
        dboth, activated = swiglu_gradient(
            dactivated, both, again=down_tape is not None, room=gate_up_group.room.rows
        )
        down_found = down_group.finish(down_gradients, down_tape, activated)
        del dactivated, activated
        dnormed, gate_up_gradients = gate_up_group.backward(
            dboth, gate_up_tape, slots, True, roomy=True
        )
        gate_up_found = gate_up_group.finish(
            gate_up_gradients, gate_up_tape, total, (inverse, weight)
        )
        dx = norm_gradient(dnormed, dtotal, total, inverse, weight)
        return (None, None, None, None, *both_gradients(ctx, dx, 4), *gate_up_found, *down_found)
