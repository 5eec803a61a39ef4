"""The second half of a decoder layer, as `attention_block.py` has the first.

x' = x + δ,   δ' = m · after(D(f(G h) ⊙ (U h)))  with  h = before x'
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_lora_cli.engine.halves import MlpHalf
from mtl_lora_cli.engine.saved import Keep, Pass, Saved, both_gradients, entry_of, opened
from mtl_lora_cli.engine.sizes import LayerSizes, Load, ModelSizes
from mtl_lora_cli.kernels.rounding import gated, gated_gradient


class MlpBlock(torch.autograd.Function):
    """x' = x + δ(o) and o' = D(f(G h) ⊙ (U h)) with h = before x'.

    Args of `apply`: the layer's half, the pass, x and o [M, d], then the tensors of the groups GU and
    D. Returns x' and o' [M, d]; M is N, or U in the last layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        half: MlpHalf,
        call: Pass,
        x: Tensor,
        before: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        count, slots = half.gate_up.count, call.chosen_slots
        entry, h = half.begin.forward_for(half.gate_up, x, before)
        both, gate_up_tape = half.gate_up.forward(h, tensors[:count], slots, call.training)
        down = half.down
        activated = gated(both, half.plan.activation, down.form, room=down.room.columns)
        out, down_tape = half.down.forward(activated, tensors[count:], slots, call.training)
        if call.learn:
            saved = Saved(ctx)
            saved.add_entry(entry)
            if call.keep.gate_up:
                saved.add("both", both)
            saved.add_tape("tape_gate_up", gate_up_tape)
            saved.add_tape("tape_down", down_tape)
            saved.close()
            ctx.static = (half, slots)
        return entry.total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dout: Tensor) -> tuple[Any, ...]:
        half, slots = ctx.static
        saved = opened(ctx)
        entry = entry_of(saved)
        gate_up_tape, down_tape = saved.get("tape_gate_up"), saved.get("tape_down")
        both = saved.get("both")
        if both is None:
            h = half.begin.again_for(half.gate_up, entry)
            both = half.gate_up.again(h, gate_up_tape, slots)
        handed, roomy = half.end.take(dout)
        dactivated, down_gradients = half.down.backward(handed, down_tape, slots, True, roomy=roomy)
        del handed
        dboth, activated = gated_gradient(
            dactivated,
            both,
            half.plan.activation,
            half.gate_up.form,
            again=down_tape is not None,
            room=half.gate_up.room.rows,
        )
        down_found = half.down.finish(down_gradients, down_tape, activated)
        del dactivated, activated
        dh, gate_up_gradients = half.gate_up.backward(dboth, gate_up_tape, slots, True, roomy=True)
        gate_up_found = half.gate_up.finish(
            gate_up_gradients, gate_up_tape, entry.total, half.begin.normed(entry)
        )
        both_found = half.begin.gradient(dh, dtotal, entry)
        return (None, None, *both_gradients(ctx, both_found, 2), *gate_up_found, *down_found)


def kept_bytes(sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool) -> int:
    """What the block leaves for its backward pass.

    A position: total d, gate_up 2F in `dtype`, 1/rms in float32; where attention's output is normed
    when it is added, that output d and another 1/rms. The last layer has U positions.
    """
    gate_up, down = layer.mlp
    value, width, plan = sizes.value, gate_up.inputs, layer.plan.mlp
    each = width * value + (4 if plan.before else 0)
    if keep.gate_up:
        each += gate_up.outputs * value
    if layer.plan.attention.after:
        each += width * value + 4
    count = load.asked if last else load.positions
    return each * count + sizes.tape(gate_up, count) + sizes.tape(down, count)


def forward_bytes(
    sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool
) -> int:
    """The most that lives beside what is kept, in the forward pass."""
    gate_up, down = layer.mlp
    each = 2 * gate_up.inputs
    each += sizes.input_width(gate_up) + sizes.input_width(down)
    if not keep.gate_up:
        each += gate_up.outputs
    if not sizes.kernels:
        each += down.inputs  # f(g) before it is multiplied
    return each * sizes.value * (load.asked if last else load.positions)


def backward_bytes(
    sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool
) -> int:
    """The most that lives beside what is kept, in the backward pass.

    The gradients of x and δ, da F, d[g | u] 2F and a F where D is adapted; what is computed again.
    """
    gate_up, down = layer.mlp
    width, inner, outputs = gate_up.inputs, down.inputs, gate_up.outputs
    again = 0 if keep.gate_up else outputs + width
    early = inner + outputs + (inner if down.rows else 0)
    if not sizes.kernels:  # f(g) and f′(g), or what they are made of; tanh's takes one more
        early += (2 if layer.plan.mlp.activation == "silu" else 3) * inner
    each = 2 * width + again + max(early, outputs + 2 * width)
    return each * sizes.value * (load.asked if last else load.positions)
