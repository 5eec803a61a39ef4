"""The first half of a layer whose state runs on from position to position, as `attention_block.py` has attention.

    x' = x + δ(o),   o' = O(mix(I(before x')))

I and O are the projections, with their adapters: one product each over all positions. What lies between them,
a short convolution and a recurrence, is the model's own code (`Core`). State must not run from one example
into the next: examples of similar length lie side by side, each begins with no state, and what a shorter
one is filled up with comes behind it. The backward pass runs that code again, some examples at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_lora_cli.engine.core import Core
from mtl_lora_cli.engine.halves import MixerHalf
from mtl_lora_cli.engine.plan import MixerPlan
from mtl_lora_cli.engine.saved import (
    Keep,
    Pass,
    Saved,
    both_gradients,
    entry_of,
    opened,
    spread_out,
)
from mtl_lora_cli.engine.segment_forms import Stacks, most_places
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.engine.sizes import LayerSizes, Load, ModelSizes
from mtl_lora_cli.kernels.backend import with_room


def mix(core: Core, x: Tensor, segments: Segments) -> Tensor:
    """The core over each segment alone: [N, Σ widths] → [N, v].

    Raises:
        ValueError: segments are trees.
    """
    stacks, source, back = _stacks(segments)
    sizes = [stack.height * stack.length for stack in stacks]
    found = [
        core(some.unflatten(0, (stack.height, stack.length))).flatten(0, 1)
        for stack, some in zip(stacks, x.index_select(0, source).split(sizes), strict=True)
    ]
    return torch.cat(found).index_select(0, back)


def mix_gradient(core: Core, x: Tensor, dout: Tensor, segments: Segments) -> Tensor:
    """The gradient of x from that of `mix`, computed again, one stack at a time."""
    stacks, source, back = _stacks(segments)
    # Nobody reads what stands where a segment is filled up: its gradient is zero.
    laid = dout.new_zeros(len(source), dout.shape[1]).index_copy_(0, back, dout)
    found, first = [], 0
    for stack in stacks:
        places = slice(first, first + stack.height * stack.length)
        shape, first = (stack.height, stack.length), places.stop
        with torch.enable_grad():
            leaf = x.index_select(0, source[places]).unflatten(0, shape).requires_grad_()
            out = core(leaf)
        (gradient,) = torch.autograd.grad(out, leaf, laid[places].unflatten(0, shape))
        found.append(gradient.flatten(0, 1))
    return torch.cat(found).index_select(0, back)


def _stacks(segments: Segments) -> Stacks:
    if segments.reach is not None:
        raise ValueError("answers with a common beginning cannot share a state that runs on")
    return segments.stacks()


class MixerBlock(torch.autograd.Function):
    """See the module. Arguments and results are those of `AttentionBlock`."""

    @staticmethod
    def forward(
        ctx: Any,
        half: MixerHalf,
        call: Pass,
        x: Tensor,
        before: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        count = half.qkv.count
        entry, h = half.begin.forward(x, before, half.qkv.room.columns)
        inputs, in_tape = half.qkv.forward(h, tensors[:count], call.slots, call.training)
        mixed = mix(half.core, inputs, call.segments)
        chosen, residual = mixed, entry.total
        if call.positions is not None:
            chosen, residual = mixed[call.positions], residual[call.positions]
        wide = with_room(chosen, half.o.room.columns)
        out, o_tape = half.o.forward(wide, tensors[count:], call.chosen_slots, call.training)
        if call.learn:
            saved = Saved(ctx)
            saved.add_entry(entry)
            if call.keep.qkv:
                saved.add("inputs", inputs)
            if call.keep.attended and o_tape is not None:
                saved.add("chosen", chosen)
            saved.add_tape("tape_in", in_tape)
            saved.add_tape("tape_o", o_tape)
            saved.close()
            ctx.static = (half, call)
        return residual, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dresidual: Tensor, dout: Tensor) -> tuple[Any, ...]:
        half, call = ctx.static
        segments, slots = call.segments, call.slots
        saved = opened(ctx)
        entry = entry_of(saved)
        in_tape, o_tape = saved.get("tape_in"), saved.get("tape_o")
        inputs, chosen = saved.get("inputs"), saved.get("chosen")
        if inputs is None:
            h = half.begin.again(entry, half.qkv.room.columns)
            inputs = half.qkv.again(h, in_tape, slots)
        if chosen is None:
            chosen = inputs
            if o_tape is not None:
                mixed = mix(half.core, inputs, segments)
                chosen = mixed if call.positions is None else mixed[call.positions]
        handed, roomy = half.end.take(dout)
        dchosen, o_gradients = half.o.backward(handed, o_tape, call.chosen_slots, True, roomy=roomy)
        o_found = half.o.finish(o_gradients, o_tape, chosen)
        dmixed = dchosen
        if call.positions is not None:
            dmixed = dchosen.new_zeros(len(entry.total), dchosen.shape[1])
            dmixed.index_add_(0, call.positions, dchosen)
        dinputs = with_room(mix_gradient(half.core, inputs, dmixed, segments), half.qkv.room.rows)
        wanted = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        dh, in_gradients = half.qkv.backward(dinputs, in_tape, slots, wanted, roomy=True)
        in_found = half.qkv.finish(in_gradients, in_tape, entry.total, half.begin.normed(entry))
        both = None
        if wanted:
            dresidual = spread_out(dresidual, call.positions, entry.total)
            both = half.begin.gradient(dh, dresidual, entry)
        return (None, None, *both_gradients(ctx, both, 2), *in_found, *o_found)


def kept_bytes(sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool) -> int:
    """What the block leaves for its backward pass.

    A position: total d, I's outputs and the mixed ones in `dtype`, 1/rms in float32; where the layer before
    leaves an output that is normed here, that output d and another 1/rms.
    """
    value, width, plan = sizes.value, layer.qkv.inputs, layer.plan.attention
    each = width * value + (4 if plan.before else 0)
    each += layer.qkv.outputs * value if keep.qkv else 0
    each += width * value + 4 if layer.norms_before else 0
    asked = load.asked if last else load.positions
    behind = layer.o.inputs * value if keep.attended and layer.o.rows else 0
    tapes = sizes.tape(layer.qkv, load.positions) + sizes.tape(layer.o, asked)
    return each * load.positions + behind * asked + tapes


def forward_bytes(
    sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool
) -> int:
    """The most that lives beside what is kept: the input, the laid out I's outputs, the core's own."""
    each = 2 * layer.qkv.inputs + sizes.input_width(layer.qkv)
    each += 2 * layer.qkv.outputs if keep.qkv else 3 * layer.qkv.outputs
    each += sizes.input_width(layer.o)
    return each * sizes.value * load.positions + _plan(layer).working * _core(layer, load)


def backward_bytes(
    sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool
) -> int:
    """The most that lives beside what is kept: gradients of x, δ and mixed, then the core's graph, or
    the gradients of I's outputs and input."""
    each = 2 * layer.qkv.inputs + 2 * layer.o.inputs
    each += 0 if keep.qkv else layer.qkv.inputs + layer.qkv.outputs
    each += 0 if keep.attended else layer.o.inputs
    behind = (2 * layer.qkv.outputs + layer.qkv.inputs) * sizes.value * load.positions
    core = _plan(layer).graph * _core(layer, load)
    return each * sizes.value * load.positions + max(core, behind)


def _core(layer: LayerSizes, load: Load) -> int:
    """Bytes of one float32 for each place of the core's largest stack."""
    chunk, longest = _plan(layer).chunk, load.segment
    filled = -(-longest // chunk) * chunk / longest
    return math.ceil(4 * filled * most_places(load.positions, longest))


def _plan(layer: LayerSizes) -> MixerPlan:
    assert isinstance(layer.plan.attention, MixerPlan)
    return layer.plan.attention
