"""The second half of a decoder layer whose MLP is a mixture of experts, as `mlp_block.py` has one MLP.

    x' = x + δ,   h = before x',   T, v the router's choice for h (`router.py`)
    δ' = m · after(Σ_{e ∈ T} v_e D_e(f(G_e h) ⊙ (U_e h)) + shared MLP of h)

The router is frozen, and so are the experts but for adapters on them; gradients go through all to h. Pairs
of a position and an expert that it asks are sorted by their experts. Biases b_e of D_e are added as Σ v_e b_e.
With a = v_e f(G_e h) ⊙ (U_e h) and da its gradient, that of log v_e is
⟨da, a⟩: what an expert gave is needed by nobody again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_lora_cli.adapters.pairs import Pairs
from mtl_lora_cli.engine.halves import ExpertsHalf
from mtl_lora_cli.engine.plan import ExpertsPlan
from mtl_lora_cli.engine.router import (
    RouterChoice,
    choose,
    router_gradient,
    router_input_gradient,
    weights_of,
)
from mtl_lora_cli.engine.saved import Keep, Pass, Saved, both_gradients, entry_of, opened
from mtl_lora_cli.engine.shared_half import SharedTape
from mtl_lora_cli.engine.sizes import LayerSizes, Load, ModelSizes
from mtl_lora_cli.kernels.clamped import Clamped
from mtl_lora_cli.kernels.expert_gate import (
    ExpertActivation,
    expert_gated,
    expert_gated_gradient,
)


class ExpertsBlock(torch.autograd.Function):
    """See the module.

    Args of `apply`: the layer's half, the pass, x and o [M, d], then the tensors of the half's groups.
    Returns x' and o' [M, d]; M is N, or U in the last layer.
    """

    @staticmethod
    def forward(
        ctx: Any, half: ExpertsHalf, call: Pass, x: Tensor, before: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        slots, training = call.chosen_slots, call.training
        *shared_tensors, of_gate_up, of_down = _split(half, tensors)
        entry, wide = half.begin.forward(x, before, half.room)
        h = wide[:, : entry.total.shape[1]]
        choice = choose(h, half.router, half.plan.router)
        pairs, values = choice.pairs, weights_of(choice, half.plan.router)
        both: Tensor | None
        both, tape_gate_up = half.gate_up.forward(
            h[pairs.position], of_gate_up, pairs, slots, training
        )
        active = expert_gated(both, pairs.sorted(values), half.plan.activation)
        both = both if call.keep.gate_up else None
        out, tape_down = half.down.forward(active, of_down, pairs, slots, training)
        del active
        summed = pairs.summed(out)
        del out
        if half.down.frozen.bias is not None:
            summed += _spread_over(choice, values).to(h.dtype) @ half.down.frozen.bias
        shared = None
        if half.shared is not None:
            added, shared = half.shared.forward(wide, shared_tensors, slots, training)
            summed += added
        if call.learn:
            saved = Saved(ctx)
            saved.add_entry(entry)
            for name, value in pairs._asdict().items():
                saved.add(name, value)
            saved.add("both", both)
            saved.add_tape("tape_gate_up", tape_gate_up)
            saved.add_tape("tape_down", tape_down)
            if shared is not None:
                _save_shared(saved, shared, kept=call.keep.gate_up)
            saved.close()
            ctx.static = (half, slots)
        return entry.total, summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dsummed: Tensor) -> tuple[Any, ...]:
        (half, slots), saved = ctx.static, opened(ctx)
        plan, entry = half.plan, entry_of(saved)
        tape_gate_up, tape_down = saved.get("tape_gate_up"), saved.get("tape_down")
        wide = half.begin.again(entry, half.room)
        h = wide[:, : entry.total.shape[1]]
        pairs = Pairs(*(saved[name] for name in Pairs._fields))
        choice, both = choose(h, half.router, plan.router, pairs), saved.pop("both")
        if both is None:
            both = half.gate_up.again(h[pairs.position], tape_gate_up, pairs, slots)
        values = weights_of(choice, plan.router)
        dactive, gradients = half.down.backward(dsummed[pairs.position], tape_down, pairs, slots)
        dboth, through, active = expert_gated_gradient(
            dactive, both, pairs.sorted(values), plan.activation, again=tape_down is not None
        )
        weighted = pairs.back(through)
        if half.down.frozen.bias is not None:
            of_bias = (dsummed @ half.down.frozen.bias.T).to(values.dtype)
            weighted += values * of_bias.gather(1, choice.chosen)
        down_found = half.down.finish(
            gradients, tape_down, dactive if active is None else active, pairs
        )
        del dactive, active, both
        dlogits = router_gradient(weighted, choice, plan.router)
        dinputs, gradients = half.gate_up.backward(dboth, tape_gate_up, pairs, slots)
        del dboth
        dh = pairs.summed(dinputs)
        del dinputs
        dh += router_input_gradient(dlogits, half.router, h)
        gate_up_found = half.gate_up.finish(
            gradients, tape_gate_up, h[pairs.position] if tape_gate_up else h, pairs
        )
        found: list[Tensor | None] = []
        if half.shared is not None:
            tape = _opened_shared(saved, len(half.shared.groups))
            dshared, some = half.shared.backward(dsummed, wide, tape, slots)
            dh += dshared
            found = [one for own in some for one in own]
        dx = half.begin.gradient(dh, dtotal, entry)
        return (None, None, *both_gradients(ctx, dx, 2), *found, *gate_up_found, *down_found)


def _spread_over(choice: RouterChoice, values: Tensor) -> Tensor:
    """v [M, k] at the places of the experts, [M, E]."""
    return torch.zeros_like(choice.shares).scatter_(1, choice.chosen, values)


def _split(half: ExpertsHalf, tensors: Sequence[Any]) -> list[Sequence[Any]]:
    """The tensors of each group."""
    found: list[Sequence[Any]] = []
    rest = list(tensors)
    for group in half.carriers:
        found.append(rest[: group.count])
        rest = rest[group.count :]
    return found


def _save_shared(saved: Saved, tape: SharedTape, *, kept: bool) -> None:
    if kept:
        saved.add("shared_both", tape.both)
    saved.add("shared_gate", tape.gate)
    for number, one in enumerate(tape.tapes):
        saved.add_tape(f"shared_tape_{number}", one)


def _opened_shared(saved: dict[str, Any], groups: int) -> SharedTape:
    tapes = tuple(saved.get(f"shared_tape_{number}") for number in range(groups))
    return SharedTape(saved.get("shared_both"), saved["shared_gate"], tapes)


def kept_bytes(sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool) -> int:
    """What the block leaves for its backward pass.

    A position: total d, 1/rms in float32, its experts and their places in int64, and gate_up 2F of each of
    them; of the shared MLP gate_up and the gate.
    """
    plan, width, inner = _plan(layer), layer.qkv.inputs, layer.inner
    count = load.asked if last else load.positions
    each = width * sizes.value + (4 if plan.before else 0) + 16 * plan.top
    if keep.gate_up:
        each += (plan.top * 2 * inner + _shared_outputs(layer)) * sizes.value
    if layer.gate is not None:
        each += sizes.value
    if layer.plan.attention.after:
        each += width * sizes.value + 4
    shared = [group for group in (layer.gate_up, layer.down, layer.gate) if group is not None]
    tapes = sum(sizes.tape(group, count) for group in shared)
    return each * count + tapes + sum(one.tape(sizes, plan.top * count) for one in layer.stacks)


def forward_bytes(
    sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool
) -> int:
    """The most that lives beside what is kept: h, each pair's input, activation and output, the sum.

    Or, later, h, the sum, and the activation and output of the shared MLP.
    """
    plan, width, inner = _plan(layer), layer.qkv.inputs, layer.inner
    pair = max(width + 2 * inner, inner + width, inner * (1 if sizes.kernels else 2), 2 * width)
    pair += 0 if keep.gate_up else 2 * inner
    if _of_each(layer):  # what the experts' own adapters add
        pair = max(pair, width + 4 * inner)
    each = 3 * width + plan.top * pair
    if layer.gate_up is not None and layer.down is not None:
        active = sizes.input_width(layer.down) + (0 if sizes.kernels else layer.down.inputs)
        later = active + (0 if keep.gate_up else layer.gate_up.outputs) + 2 * width
        each = max(each, 3 * width + later)
    return (each * sizes.value + _routing(layer)) * (load.asked if last else load.positions)


def backward_bytes(
    sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool
) -> int:
    """The most that lives beside what is kept: the gradients of x, δ and h, and of each pair's parts.

    Or, later, those of the shared MLP's.
    """
    plan, width, inner = _plan(layer), layer.qkv.inputs, layer.inner
    terms = 0 if sizes.kernels else _terms(plan.activation) * inner
    middle = max(width + inner, 4 * inner + terms)
    middle += 0 if keep.gate_up else 2 * inner
    end = max(2 * inner + width, 2 * width) + (width if _of_each(layer) else 0)
    each = max(2 * width + plan.top * middle, 4 * width + plan.top * end)
    if layer.gate_up is not None and layer.down is not None:
        inside, outputs = layer.down.inputs, layer.gate_up.outputs
        early = 2 * inside + outputs
        if not sizes.kernels:
            early += _terms(plan.activation) * inside
        again = 0 if keep.gate_up else outputs
        each = max(each, 3 * width + again + max(early, outputs + 2 * width))
    return (each * sizes.value + _routing(layer)) * (load.asked if last else load.positions)


def _of_each(layer: LayerSizes) -> bool:
    """Whether each expert has an adapter of its own."""
    return any(one.units > 1 for one in layer.stacks)


def _terms(activation: ExpertActivation) -> int:
    """What plain torch makes of an activation's gradient besides, as many times as it has values."""
    return 6 if isinstance(activation, Clamped) else 2 if activation == "silu" else 3


def _plan(layer: LayerSizes) -> ExpertsPlan:
    assert isinstance(layer.plan.mlp, ExpertsPlan)
    return layer.plan.mlp


def _shared_outputs(layer: LayerSizes) -> int:
    """Values of the shared MLP's gate and up."""
    return 0 if layer.gate_up is None else layer.gate_up.outputs


def _routing(layer: LayerSizes) -> int:
    """Shares and logits of all experts in float32; order, positions and weights of the pairs."""
    plan = _plan(layer)
    return 3 * 4 * plan.router.experts + 32 * plan.top
