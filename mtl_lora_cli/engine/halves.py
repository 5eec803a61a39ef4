"""The frozen parts of a layer's two halves, as the blocks use them, and what both do at their ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.frozen_stack import FrozenStack
from mtl_lora_cli.engine.core import Core, core_of
from mtl_lora_cli.engine.group import Group
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
from mtl_lora_cli.kernels.backend import with_room
from mtl_lora_cli.kernels.head_norm import HeadNorms
from mtl_lora_cli.kernels.norm import add_norm, apply_norm, norm_gradient


class Norm(NamedTuple):
    """A norm of the stream, or of what a block adds to it: its weight, w or 1 + w, and ε."""

    weight: Tensor
    eps: float

    @staticmethod
    def of(module: nn.Module, plan: NormPlan) -> Norm:
        """By a plan; 1 + w in float32 or better, as Gemma computes it."""
        weight = cast(Tensor, module.weight)
        if plan.plus_one:
            weight = 1 + weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        return Norm(weight, plan.eps)


@dataclass(frozen=True)
class Begin:
    """x' = x + δ and the block's input h: x' itself, or normed.

    Attributes:
        norm: before the block, or None.
    """

    norm: Norm | None

    def forward(
        self, x: Tensor, delta: Tensor | None, room: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x' [N, d], h [N, d + room], and r [N] of the norm."""
        if self.norm is not None:
            return add_norm(x, delta, *self.norm, room=room)
        total = x if delta is None else x + delta
        return total, with_room(total, room), None

    def again(self, total: Tensor, inverse: Tensor | None, room: int) -> Tensor:
        """h once more."""
        if self.norm is None or inverse is None:
            return with_room(total, room)
        return apply_norm(total, inverse, self.norm.weight, room=room)

    def normed(self, inverse: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """What `Group.finish` wants to know of the norm before its input."""
        return None if self.norm is None or inverse is None else (inverse, self.norm.weight)

    def gradient(
        self, dh: Tensor, dresidual: Tensor, total: Tensor, inverse: Tensor | None
    ) -> Tensor:
        """The gradient of x', from that of h and the one that comes past the block."""
        if self.norm is None or inverse is None:
            return dh + dresidual
        return norm_gradient(dh, dresidual, total, inverse, self.norm.weight)


@dataclass(frozen=True)
class End:
    """δ' = m · out, or m · norm(out).

    Attributes:
        norm: behind the block, or None.
        multiplier: m.
    """

    norm: Norm | None
    multiplier: float

    def forward(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """δ' [M, d], and r [M] of the norm."""
        inverse = None
        if self.norm is not None:
            _, out, inverse = add_norm(out, None, *self.norm)
        return out if self.multiplier == 1.0 else out * self.multiplier, inverse

    def gradient(self, ddelta: Tensor, out: Tensor | None, inverse: Tensor | None) -> Tensor:
        """The gradient of out."""
        if self.multiplier != 1.0:
            ddelta = ddelta * self.multiplier
        if self.norm is None or out is None or inverse is None:
            return ddelta
        return norm_gradient(ddelta.contiguous(), None, out, inverse, self.norm.weight)


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
        self.gate_up, self.down = (
            StackGroup(FrozenStack(stack, name, transposed=plan.transposed))
            for name in ("gate_up_proj", "down_proj")
        )

    @property
    def groups(self) -> tuple[Group, ...]:
        """Linear layers of one input each: those of the shared MLP."""
        return () if self.shared is None else self.shared.groups

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
    """Both halves of a layer."""

    attention: AttentionHalf | MixerHalf
    mlp: MlpHalf | ExpertsHalf

    @property
    def groups(self) -> tuple[Group, ...]:
        """Linear layers of one input each, in the order of `LayerPlan.groups`."""
        return (self.attention.qkv, self.attention.o, *self.mlp.groups)

    @staticmethod
    def of(module: nn.Module, plan: LayerPlan, *, resident: bool) -> Layer:
        """The parts of a transformers layer, by a plan."""

        def group(paths: tuple[str, ...], *, roomy: bool = True) -> Group:
            layers = (module.get_submodule(path) for path in paths)
            return Group(*layers, resident=resident, roomy=roomy)

        def norm(one: NormPlan | None) -> Norm | None:
            return None if one is None else Norm.of(module.get_submodule(one.path), one)

        first, second = plan.attention, plan.mlp
        qkv, o = (group(paths) for paths in first.groups)
        begin, end = Begin(norm(second.before)), End(norm(second.after), second.multiplier)
        if isinstance(second, ExpertsPlan):
            shared = None if second.shared is None else _shared(second.shared, group)
            half: MlpHalf | ExpertsHalf = ExpertsHalf(module, second, begin, end, shared)
        else:
            gate_up, down = (group(paths) for paths in second.groups)
            half = MlpHalf(plan=second, begin=begin, gate_up=gate_up, down=down, end=end)
        first_begin, first_end = Begin(norm(first.before)), End(norm(first.after), first.multiplier)
        if isinstance(first, MixerPlan):
            core = core_of(module, first)
            return Layer(MixerHalf(first, first_begin, qkv, core, o, first_end), half)
        q, k = norm(first.q_norm), norm(first.k_norm)
        heads = None if q is None or k is None else HeadNorms(q.weight, k.weight, q.eps)
        sinks = None if first.sinks is None else module.get_submodule(first.sinks).sinks
        sinks = cast(Tensor | None, sinks)
        return Layer(AttentionHalf(first, first_begin, qkv, heads, o, first_end, sinks), half)


def _shared(plan: SharedPlan, group: Callable[..., Group]) -> SharedHalf:
    """The MLP that every position asks."""
    gate = None if plan.gate is None else group((plan.gate,), roomy=False)
    return SharedHalf(plan, group(plan.gate_up), group((plan.down,)), gate)
