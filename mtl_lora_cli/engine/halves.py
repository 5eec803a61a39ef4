"""The frozen parts of a layer's two halves, as the blocks use them, and what both do at their ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.experts import MultiTaskStack, frozen_stacks
from mtl_lora_cli.engine.core import Core, core_of
from mtl_lora_cli.engine.group import Group
from mtl_lora_cli.engine.heads import HeadLayout
from mtl_lora_cli.engine.plan import (
    AttentionPlan,
    ExpertsPlan,
    LayerPlan,
    MixerPlan,
    MlpPlan,
    NormPlan,
    SharedPlan,
)
from mtl_lora_cli.engine.router import RouterWeights
from mtl_lora_cli.engine.shared_half import SharedHalf
from mtl_lora_cli.engine.stack_group import StackGroup
from mtl_lora_cli.kernels import norm as norms
from mtl_lora_cli.kernels import rounding, stream
from mtl_lora_cli.kernels.backend import with_room
from mtl_lora_cli.kernels.fp8 import Form, Rounded, ScaledRows
from mtl_lora_cli.kernels.head_norm import HeadNorms
from mtl_lora_cli.kernels.rounding import Made
from mtl_lora_cli.kernels.stream import After, Entry, Norm


def norm_of(module: nn.Module, plan: NormPlan) -> Norm:
    """By a plan: its weight, w or 1 + w, and ε; 1 + w in float32 or better, as Gemma computes it."""
    weight = cast(Tensor, module.weight)
    if plan.plus_one:
        weight = 1 + weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return Norm(weight, plan.eps)


class End:
    """The end of a block: what becomes of its output when whoever comes next adds it to the stream.

    Args:
        after: a norm, a multiplier, both or nothing.
        group: whose output it is, or None.
    """

    def __init__(self, after: After, group: Group | None) -> None:
        self.after = after
        self._group = group
        self._wide: Tensor | None = None
        self._rows: ScaledRows | None = None

    @property
    def form(self) -> Form:
        """What the group reads of the gradient of its output."""
        return "exact" if self._group is None else self._group.form

    @property
    def room(self) -> int:
        """Columns that the group uses behind the gradient of its output."""
        return 0 if self._group is None else self._group.room.rows

    def hand(self, wide: Tensor, rows: ScaledRows | None = None) -> Tensor:
        """The gradient of the output, of [gradient | room]; `take` gives the room, or the 8-bit rows, back."""
        if not self.room and rows is None:
            return wide
        self._wide, self._rows = wide, rows
        return wide[:, : wide.shape[1] - self.room]

    def take(self, gradient: Tensor) -> tuple[Made, bool]:
        """[gradient | room] and True, or the gradient with its 8-bit rows and False, where it is what was handed
        over; else it alone and False."""
        (wide, rows), self._wide, self._rows = (self._wide, self._rows), None, None
        if wide is None or wide.data_ptr() != gradient.data_ptr():
            return gradient, False
        if (len(wide), wide.stride()) != (len(gradient), gradient.stride()):
            return gradient, False
        if rows is not None:
            return Rounded(rows, gradient, gradient.dtype), False
        return wide, True


@dataclass(frozen=True)
class Begin:
    """x' = x + δ and the block's input h: x' itself, or normed.

    Attributes:
        norm: before the block, or None.
        end: of the block before, which says how δ follows from its output; None before the first one.
    """

    norm: Norm | None
    end: End | None

    def forward(self, x: Tensor, out: Tensor | None, room: int) -> tuple[Entry, Tensor]:
        """What the backward pass is to know, and h [N, d + room]."""
        return stream.enter(x, out, self._after, self.norm, room=room)

    def forward_for(self, group: Group, x: Tensor, out: Tensor | None) -> tuple[Entry, Made]:
        """The same, h as one group alone reads it."""
        room = group.room.columns
        return rounding.enter(x, out, self._after, self.norm, group.form, room=room)

    def again(self, entry: Entry, room: int) -> Tensor:
        """h once more."""
        if self.norm is None or entry.inverse is None:
            return with_room(entry.total, room)
        return norms.apply_norm(entry.total, entry.inverse, self.norm.weight, room=room)

    def again_for(self, group: Group, entry: Entry) -> Made:
        """The same for one group alone."""
        if self.norm is None or entry.inverse is None:
            return self.again(entry, group.room.columns)
        room, weight = group.room.columns, self.norm.weight
        return rounding.apply_norm(entry.total, entry.inverse, weight, group.form, room=room)

    def normed(self, entry: Entry) -> tuple[Tensor, Tensor] | None:
        """What `Group.finish` wants to know of the norm before its input."""
        if self.norm is None or entry.inverse is None:
            return None
        return entry.inverse, self.norm.weight

    def gradient(self, dh: Tensor, dresidual: Tensor | None, entry: Entry) -> tuple[Tensor, Tensor]:
        """The gradients of x and of the output of the block before.

        Of h's, and of the one that comes past the block.
        """
        if self.end is None:
            return stream.enter_gradient(dh, dresidual, entry, self._after, self.norm)
        dx, dout, rows = rounding.enter_gradient(
            dh, dresidual, entry, self._after, self.norm, self.end.form, room=self.end.room
        )
        return dx, self.end.hand(dout, rows)

    @property
    def _after(self) -> After:
        return After() if self.end is None else self.end.after


@dataclass(frozen=True)
class AttentionHalf:
    """The frozen parts of a layer's attention; `heads` norms queries and keys, `sinks` are logits [H]."""

    plan: AttentionPlan
    begin: Begin
    qkv: Group
    heads: HeadNorms | None
    o: Group
    end: End
    sinks: Tensor | None = None

    @cached_property
    def layout(self) -> HeadLayout:
        """How what the projections give becomes queries, keys and values."""
        return HeadLayout.of(self.plan)


@dataclass(frozen=True)
class MixerHalf:
    """The frozen parts of a layer whose state runs on: `core` lies between the projections."""

    plan: MixerPlan
    begin: Begin
    qkv: Group
    core: Core
    o: Group
    end: End


@dataclass(frozen=True)
class MlpHalf:
    """The frozen parts of a layer's MLP."""

    plan: MlpPlan
    begin: Begin
    gate_up: Group
    down: Group
    end: End

    @property
    def groups(self) -> tuple[Group, ...]:
        """Linear layers of one input each."""
        return (self.gate_up, self.down)

    @property
    def carriers(self) -> tuple[Group | StackGroup, ...]:
        """What may carry adapters."""
        return self.groups


class ExpertsHalf:
    """The frozen parts of a layer's experts.

    Weights are read when they are used: they may be taken away between two passes.

    Args:
        module: the layer.
        plan, begin, end: as of the other halves.
        shared: what every position asks besides.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: ExpertsPlan,
        begin: Begin,
        end: End,
        shared: SharedHalf | None,
    ) -> None:
        self.plan = plan
        self.begin = begin
        self.end = end
        self.shared = shared
        self._router = module.get_submodule(plan.router.path)
        stack = module.get_submodule(plan.stack)
        frozen = frozen_stacks(stack, transposed=plan.transposed)
        self.gate_up, self.down = (
            StackGroup(
                one,
                cast(MultiTaskStack | None, stack._modules.get(name)),
                biased=name == "gate_up_proj",
            )
            for name, one in frozen.items()
        )

    @property
    def groups(self) -> tuple[Group, ...]:
        """Linear layers of one input each: those of the shared MLP."""
        return () if self.shared is None else self.shared.groups

    @property
    def carriers(self) -> tuple[Group | StackGroup, ...]:
        """What may carry adapters: the groups, and the two stacks of experts."""
        return (*self.groups, self.gate_up, self.down)

    @property
    def room(self) -> int:
        """Columns to leave free behind h."""
        return 0 if self.shared is None else self.shared.gate_up.room.columns

    @property
    def router(self) -> RouterWeights:
        """What the router multiplies with and adds."""
        own, correction = self._router, self.plan.router.correction
        return RouterWeights(
            cast(Tensor, own.weight),
            getattr(own, "bias", None),
            None if correction is None else getattr(own, correction),
        )


@dataclass(frozen=True)
class Layer:
    """Both halves of a layer, and what the stream is multiplied by behind them."""

    attention: AttentionHalf | MixerHalf
    mlp: MlpHalf | ExpertsHalf
    scale: float = 1.0

    @property
    def groups(self) -> tuple[Group, ...]:
        """Linear layers of one input each, in the order of `LayerPlan.groups`."""
        return (self.attention.qkv, self.attention.o, *self.mlp.groups)

    @property
    def carriers(self) -> tuple[Group | StackGroup, ...]:
        """What may carry adapters: the groups, and stacks of experts."""
        return (self.attention.qkv, self.attention.o, *self.mlp.carriers)

    @staticmethod
    def of(module: nn.Module, plan: LayerPlan, end: End | None, *, resident: bool) -> Layer:
        """The parts of a transformers layer, by a plan; `end`: of the layer before."""

        def group(paths: tuple[str, ...], *, roomy: bool = True) -> Group:
            layers = (module.get_submodule(path) for path in paths)
            return Group(*layers, resident=resident, roomy=roomy)

        def norm(one: NormPlan | None) -> Norm | None:
            return None if one is None else norm_of(module.get_submodule(one.path), one)

        def kept(one: NormPlan | None) -> Norm | None:
            """With a weight of its own: the next layer reads it, when this one's may have been taken away."""
            found = norm(one)
            return None if found is None else found._replace(weight=found.weight.detach().clone())

        first, second = plan.attention, plan.mlp
        qkv, o = (group(paths) for paths in first.groups)
        scale = 1.0 if plan.scale is None else float(cast(Tensor, getattr(module, plan.scale)))
        first_begin = Begin(norm(first.before), end)
        first_end = End(After(kept(first.after), first.multiplier), o)
        begin, after = (
            Begin(norm(second.before), first_end),
            After(kept(second.after), second.multiplier * scale),
        )
        if isinstance(second, ExpertsPlan):
            shared = None if second.shared is None else _shared(second.shared, group)
            half: MlpHalf | ExpertsHalf = ExpertsHalf(
                module, second, begin, End(after, None), shared
            )
        else:
            gate_up, down = (group(paths) for paths in second.groups)
            half = MlpHalf(second, begin, gate_up, down, End(after, down))
        if isinstance(first, MixerPlan):
            core = core_of(module, first)
            return Layer(MixerHalf(first, first_begin, qkv, core, o, first_end), half, scale)
        q, k = norm(first.q_norm), norm(first.k_norm)
        heads = None if q is None or k is None else HeadNorms(q.weight, k.weight, q.eps)
        sinks = None if first.sinks is None else module.get_submodule(first.sinks).sinks
        sinks = cast(Tensor | None, sinks)
        attention = AttentionHalf(first, first_begin, qkv, heads, o, first_end, sinks)
        return Layer(attention, half, scale)


def _shared(plan: SharedPlan, group: Callable[..., Group]) -> SharedHalf:
    """The MLP that every position asks."""
    gate = None if plan.gate is None else group((plan.gate,), roomy=False)
    return SharedHalf(plan, group(plan.gate_up), group((plan.down,)), gate)
