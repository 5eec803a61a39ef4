"""The two halves of a LLaMA decoder layer, each one autograd function.

    AttentionBlock   x' = x + δ,   δ' = O(attention(QKV(norm x')))
    MlpBlock         x' = x + δ,   δ' = D(silu(G norm x') ⊙ (U norm x'))

A block takes the residual stream x and what the block before has yet to add to it (δ), and returns
both anew, so that each addition happens inside a norm's kernel. Written by hand rather than left to
autograd because of what it saves: weights are frozen, so most inputs are needed by nobody; and what
is needed can be dropped and computed again (`Keep`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_lora_cli.adapters.frozen import FrozenWeights, Room
from mtl_lora_cli.adapters.function import AdapterProducts, Factors
from mtl_lora_cli.adapters.layer import MultiTaskLinear
from mtl_lora_cli.adapters.routing import Slots
from mtl_lora_cli.kernels.norm import add_norm, apply_norm, norm_gradient
from mtl_lora_cli.kernels.swiglu import swiglu, swiglu_gradient
from mtl_lora_cli.models.packing import Packing, attend, attend_gradient

_MOST_OWN_ROWS = 128
Norm = tuple[Tensor, Tensor]  # r [N] and w [d] of h = w ⊙ (r x)


@dataclass(frozen=True)
class Keep:
    """What the forward pass leaves for the backward pass instead of having it computed again.

    Attributes:
        attended: outputs of attention. Again: attention.
        qkv, gate_up: outputs of these projections. Again: a large product each.
    """

    attended: bool = True
    qkv: bool = True
    gate_up: bool = True


class Group:
    """Projections of one input, some or all of them adapted.

    Inputs and output gradients come with room behind their columns (`room`), where the adapter's
    own small factor goes, so that the large product takes both; see `adapters/frozen.py`.

    Args:
        layers: as they stand in the model: `MultiTaskLinear`, or a frozen linear layer.
        resident: whether the weights stay in memory; see `FrozenWeights.lay_together`.

    Attributes:
        all_tasks: z holds the own rows of all tasks, present or not.
    """

    def __init__(self, *layers: torch.nn.Module, resident: bool = True) -> None:
        bases = [
            layer.base_layer if isinstance(layer, MultiTaskLinear) else layer for layer in layers
        ]
        self.frozen = FrozenWeights(bases)  # type: ignore[arg-type]
        self.adapted = [layer for layer in layers if isinstance(layer, MultiTaskLinear)]
        self.products: AdapterProducts | None = None
        self.all_tasks = False
        wanted = Room()
        if self.adapted:
            spans = tuple(
                span
                for layer, span in zip(layers, self.frozen.spans, strict=True)
                if isinstance(layer, MultiTaskLinear)
            )
            self.products = self.adapted[0].products(spans)
            # Parts of each task's own stand beside the shared ones, those of all tasks where they
            # are few: then there is one size whatever tasks are present.
            first = self.adapted[0]
            own = first.config.family.spread == "own"
            self.all_tasks = own and first.routing.tasks * first.config.task_rank <= _MOST_OWN_ROWS
            if self.all_tasks or not own:
                with torch.no_grad():
                    each = [layer.factors(None) for layer in self.adapted]
                wanted = Room(
                    columns=sum(up.shape[0] * up.shape[2] for _, up in each),
                    rows=sum(down.shape[0] * down.shape[1] for down, _ in each),
                )
        self.frozen.lay_together(wanted, resident=resident)

    @property
    def room(self) -> Room:
        """Columns to leave free behind the group's input, and behind its output's gradient."""
        return self.frozen.room

    @property
    def count(self) -> int:
        """Number of `tensors`."""
        return 1 + 2 * len(self.adapted) if self.adapted else 0

    def wanted(self, slots: Slots) -> Tensor | None:
        """The tasks whose own parts are read: [P], or None for all."""
        return None if self.all_tasks else slots.wanted

    def tensors(self, mixing: Tensor | None, slots: Slots) -> list[Tensor | None]:
        """What autograd must know of: M, the downs, the ups."""
        if self.products is None:
            return []
        each = [layer.factors(self.wanted(slots)) for layer in self.adapted]
        return [mixing, *(down for down, _ in each), *(up for _, up in each)]

    def forward(
        self, wide: Tensor, tensors: Sequence[Any], slots: Slots, training: bool
    ) -> tuple[Tensor, Tape | None]:
        """y from [x | room], and what the backward pass needs of the adapters."""
        x = self.input(wide)
        if self.products is None or slots.count == 0:
            return self.frozen.product(x, self.frozen.weights()), None
        mixing, rest = tensors[0], tensors[1:]
        count = len(self.adapted)
        factors = self.products.factors(self.frozen, x.dtype, rest[:count], rest[count:], mixing)
        mask = self.products.mask(x) if training else None
        z = self.products.narrow(x, mask, factors)
        tape = Tape(factors, z, mask, tuple(like.shape for like in rest))
        return self._product(wide, tape, slots), tape

    def again(self, wide: Tensor, tape: Tape | None, slots: Slots) -> Tensor:
        """y once more."""
        if tape is None:
            return self.frozen.product(self.input(wide), self.frozen.weights())
        return self._product(wide, tape, slots)

    def input(self, wide: Tensor) -> Tensor:
        """x of [x | room]."""
        return wide[:, : self.frozen.shape[1]]

    def backward(
        self, wide: Tensor, tape: Tape | None, slots: Slots, wanted: bool, *, roomy: bool
    ) -> tuple[Tensor | None, Gradients | None]:
        """dx where it is wanted, and the adapters' gradients, that of A unfinished.

        Args:
            wide: [dy | room], or dy alone where it is not `roomy`.
            tape, slots: of the forward pass.
            wanted: whether dx is.
            roomy: whether there is room behind dy.
        """
        weights = self.frozen.weights()
        dy = wide[:, : self.frozen.shape[0]]
        if self.products is None or tape is None:
            return self.frozen.input_gradient(dy, weights) if wanted else None, None
        u = self.products.spread(tape.z, tape.factors, slots)
        dz, dmixing, dups = self.products.gradients(dy, tape.z, u, tape.factors, slots)
        found = Gradients(dz, dmixing, dups)
        if not wanted:
            return None, found
        if roomy and self.room.rows and tape.mask is None:
            wide[:, self.frozen.shape[0] :].copy_(dz)
            return self.frozen.input_gradient(wide, weights, tape.factors.down), found
        dx = self.frozen.input_gradient(dy, weights)
        self.products.add_input_gradient(dx, dz, tape.mask, tape.factors)
        return dx, found

    def finish(
        self, gradients: Gradients | None, tape: Tape | None, x: Tensor, norm: Norm | None = None
    ) -> list[Tensor | None]:
        """The gradients of `tensors`.

        Args:
            gradients: from `backward`.
            tape: of the forward pass.
            x: the group's input [N, in]; with `norm` what the norm before it was given.
            norm: that norm.
        """
        if self.products is None:
            return []
        if gradients is None or tape is None:
            return [None] * self.count
        if norm is None:
            ddown = self.products.down_gradient(gradients.dz, x, tape.mask)
        else:
            ddown = self.products.normed_down_gradient(gradients.dz, x, *norm, tape.mask)
        half = len(tape.shapes) // 2
        dtype = self.adapted[0].lora_A.dtype
        parameters = self.products.parameter_gradients(
            tape.shapes[:half], tape.shapes[half:], dtype, ddown, gradients.dups
        )
        return [gradients.dmixing, *parameters]

    def _product(self, wide: Tensor, tape: Tape, slots: Slots) -> Tensor:
        assert self.products is not None
        weights = self.frozen.weights()
        if self.room.columns:
            self.products.spread(tape.z, tape.factors, slots, out=wide[:, self.frozen.shape[1] :])
            return self.frozen.product(wide, weights, tape.factors.up)
        y = self.frozen.product(wide, weights)
        self.products.add_up(y, self.products.spread(tape.z, tape.factors, slots), tape.factors)
        return y


@dataclass
class Tape:
    """What a group's forward pass leaves: factors in the activations' dtype, z, the mask, and the
    shapes of the downs and ups."""

    factors: Factors
    z: Tensor
    mask: Tensor | None
    shapes: tuple[torch.Size, ...]

    def tensors(self) -> list[Tensor | None]:
        return [*self.factors, self.z, self.mask]

    @staticmethod
    def of(tensors: Sequence[Tensor], shapes: tuple[torch.Size, ...]) -> Tape:
        down, up, mixing, z, mask = tensors
        return Tape(Factors(down, up, mixing), z, mask, shapes)


@dataclass
class Gradients:
    """What a group's backward pass has found before A's gradient is asked for."""

    dz: Tensor
    dmixing: Tensor | None
    dups: list[Tensor]


@dataclass(frozen=True)
class Pass:
    """What holds for all layers of one pass through the model.

    Attributes:
        slots: the routing of the N positions.
        packing: attention's view of them.
        positions: [U] int64: the last layer goes on with these positions alone; None for all.
        chosen_slots: the routing of the positions that go on.
        keep: what is kept for the backward pass.
        training: whether dropout is on.
        learn: whether a backward pass will come.
    """

    slots: Slots
    packing: Packing
    positions: Tensor | None
    chosen_slots: Slots
    keep: Keep
    training: bool
    learn: bool


class _Saved:
    """Names for what a block saves: `save_for_backward` takes a flat list."""

    def __init__(self, ctx: Any) -> None:
        self.names: list[tuple[str, int, Any]] = []
        self.flat: list[Tensor | None] = []
        self._ctx = ctx

    def add(self, name: str, tensor: Tensor) -> None:
        self.names.append((name, 1, None))
        self.flat.append(tensor)

    def add_tape(self, name: str, tape: Tape | None) -> None:
        if tape is not None:
            tensors = tape.tensors()
            self.names.append((name, len(tensors), tape.shapes))
            self.flat += tensors

    def close(self) -> None:
        self._ctx.save_for_backward(*self.flat)
        self._ctx.names = self.names


def _open(ctx: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    tensors = list(ctx.saved_tensors)
    for name, count, shapes in ctx.names:
        own, tensors = tensors[:count], tensors[count:]
        found[name] = own[0] if shapes is None else Tape.of(own, shapes)
    return found


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
            saved = _Saved(ctx)
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
        saved = _open(ctx)
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
        dattended = _spread(dchosen, call.positions, attended)
        room = qkv_group.room.rows
        dqkv = attend_gradient(dattended, qkv, attended, state, call.packing, room=room)
        ctx.state = state = None
        wanted = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        dnormed, qkv_gradients = qkv_group.backward(dqkv, qkv_tape, call.slots, wanted, roomy=True)
        qkv_found = qkv_group.finish(qkv_gradients, qkv_tape, total, (inverse, weight))
        dx = None
        if wanted:
            dresidual = _spread(dresidual, call.positions, total)
            dx = norm_gradient(dnormed, dresidual, total, inverse, weight)
        return (None, None, None, None, *_both(ctx, dx, 4), *qkv_found, *o_found)


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
            saved = _Saved(ctx)
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
        saved = _open(ctx)
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
        return (None, None, None, None, *_both(ctx, dx, 4), *gate_up_found, *down_found)


def _both(ctx: Any, dx: Tensor | None, at: int) -> tuple[Tensor | None, Tensor | None]:
    """x and δ have one gradient."""
    x_wanted, delta_wanted = ctx.needs_input_grad[at : at + 2]
    return dx if x_wanted else None, dx if delta_wanted else None


def _spread(chosen: Tensor, positions: Tensor | None, like: Tensor) -> Tensor:
    """Rows put back to their positions, zero elsewhere."""
    if positions is None:
        return chosen
    return torch.zeros_like(like).index_add_(0, positions, chosen)
