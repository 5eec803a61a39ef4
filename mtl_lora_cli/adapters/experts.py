"""Adapters on the experts of a mixture, which transformers keeps in two stacks of matrices.

`gate_up_proj` [E, 2F, d] and `down_proj` [E, d, F] are adapted each: by one adapter for all experts of a
layer (`experts: shared`), or by one for each (`each`). An adapter is the method's own, mixing by task
included, so for each expert and task there is a ΔW that is added to its matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.frozen_stack import FrozenStack, is_stack
from mtl_lora_cli.adapters.layer import TaskLayer, mixing_of
from mtl_lora_cli.adapters.methods.base import Settings
from mtl_lora_cli.adapters.pairs import Pairs
from mtl_lora_cli.adapters.routing import Routing, Slots
from mtl_lora_cli.adapters.stack_products import AdaptedStack, StackProducts

STACKS = ("gate_up_proj", "down_proj")


class MultiTaskStack(TaskLayer):
    """y_s = W_e x_s + b_e + s · B M_t A x_s for the pair s of a position of task t and an expert e.

    Args:
        frozen: the stack.
        each: B, M_t and A are one expert's own.
        config, routing, shared, rank: as of `TaskLayer`.
    """

    def __init__(
        self,
        frozen: FrozenStack,
        config: Settings,
        routing: Routing,
        shared: Mapping[str, nn.Parameter] | None = None,
        rank: int | None = None,
        *,
        each: bool,
    ) -> None:
        sides = frozen.out, frozen.width
        units = frozen.experts if each else None
        super().__init__(frozen.weight, sides, config, routing, shared, rank, units)
        self.frozen = frozen
        self._outer: tuple[nn.Module, ...] = ()  # not a module of this one's
        self.kind = (*self.kind, "stack", units)

    @property
    def in_features(self) -> int:
        """Of one expert's matrix."""
        return self.frozen.width

    @property
    def out_features(self) -> int:
        """Of one expert's matrix."""
        return self.frozen.out

    def weight_name(self, path: str) -> str:
        """A stack is a parameter, not a layer with one."""
        return path

    def stack_products(self) -> StackProducts:
        """The adapter's arithmetic over pairs."""
        return StackProducts(self.products((0, self.out_features)), each=self.stacked)

    @property
    def outer(self) -> nn.Module:
        """The module of experts."""
        return self._outer[0]

    def forward(self, x: Tensor, pairs: Pairs, slots: Slots) -> Tensor:
        """x [S, in] → [S, out]; `slots` are the routing of the positions."""
        if slots.count == 0:
            return product(self.frozen, x, pairs)
        products = self.stack_products()
        y = AdaptedStack.apply(
            x,
            self.frozen,
            products,
            pairs,
            pairs.slots(slots, each=self.stacked),
            products.mask(x) if self.training else None,
            mixing_of([self], slots.present),
            self.frozen.weight,
            *self.factors(slots.present),
        )
        return cast(Tensor, y)

    def task_update(self, task: int) -> tuple[Tensor, Tensor]:
        """A'_t and B'_t of each expert [E, k, in] and [E, out, k]; of one for all the same ones E times."""
        down, up = super().task_update(task)
        if self.stacked:
            return down, up
        experts = self.frozen.experts
        return down.expand(experts, -1, -1), up.expand(experts, -1, -1)


class MultiTaskExperts(nn.Module):
    """Stands in the place of transformers' module of experts, and is called like it.

    Args:
        base: that module; whatever else is asked for is its.
        stacks: the two projections.
        routing: tells which task each activation belongs to.
    """

    def __init__(
        self, base: nn.Module, stacks: Mapping[str, MultiTaskStack], routing: Routing
    ) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.routing = routing
        for name, stack in stacks.items():
            stack._outer = (self,)
            self._modules[name] = stack  # before the base's parameter of this name

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Σ_e v_e D_e(f(G_e h) ⊙ (U_e h)).

        Args:
            hidden: h [*lead, d]; the task ids must lead `lead`.
            chosen: int64 [M, k], the experts that each position asks.
            weights: v [M, k].
        """
        slots = self.routing.slots(hidden.shape[:-1], hidden.device)
        stacks = [cast(MultiTaskStack, self._modules[name]) for name in STACKS]
        first, second = (partial(stack, slots=slots) for stack in stacks)
        experts = stacks[0].frozen.experts
        return mixed(self.base_layer, experts, first, second, hidden, chosen, weights)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


def mixed(
    base: Any,
    experts: int,
    gate_up: Callable[..., Tensor],
    down: Callable[..., Tensor],
    hidden: Tensor,
    chosen: Tensor,
    weights: Tensor,
) -> Tensor:
    """Σ_e v_e D_e(f(G_e h) ⊙ (U_e h)), by two projections of pairs; see `MultiTaskExperts.forward`."""
    pairs = Pairs.of(chosen, experts)
    flat = hidden.reshape(-1, hidden.shape[-1])
    out = down(base._apply_gate(gate_up(flat[pairs.position], pairs)), pairs)
    out = out * pairs.sorted(weights)[:, None]
    return pairs.summed_exactly(out).to(hidden.dtype).view_as(hidden)


def multiply_stacks(model: nn.Module) -> None:
    """Give modules of experts in 4 bits our products, wherever the model's own code calls them."""
    for _, module in expert_modules(dict(model.named_modules())):
        first, second = frozen_stacks(module).values()
        if getattr(first.weight, "quant_state", None) is not None:
            calls = partial(product, first), partial(product, second)
            module.forward = partial(mixed, module, first.experts, *calls)


class StackFrame(nn.Module):
    """A module of experts with sizes and without weights, for adapters without their base model.

    Args:
        transposed: its matrices are stored as [in, out].
    """

    has_gate = True

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed

    def add(self, name: str, experts: int, out: int, width: int) -> None:
        """A stack that takes the memory of one number."""
        sides = (width, out) if self.is_transposed else (out, width)
        empty = torch.zeros(1).expand(experts, *sides)
        self.register_parameter(name, nn.Parameter(empty, requires_grad=False))


def product(frozen: FrozenStack, x: Tensor, pairs: Pairs) -> Tensor:
    """W_e x_s + b_e alone, [S, in] → [S, out]; gradients flow to x."""
    y = AdaptedStack.apply(x, frozen, None, pairs, None, None, None, frozen.weight, None, None)
    return cast(Tensor, y)


def expert_modules(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Those of the modules, by path, that hold experts as two stacks of matrices."""
    for path, module in modules.items():
        stacks = [module._parameters.get(name) for name in STACKS]
        whole = all(one is not None and is_stack(one) for one in stacks)
        if whole and getattr(module, "has_gate", True) and hasattr(module, "is_transposed"):
            yield path, module


def frozen_stacks(module: nn.Module, *, transposed: bool | None = None) -> dict[str, FrozenStack]:
    """The two stacks of a module of experts, adapted or not.

    Args:
        module: of experts.
        transposed: how its matrices are stored; None: as it says itself.
    """
    base: Any = getattr(module, "base_layer", module)
    transposed = bool(base.is_transposed) if transposed is None else transposed
    return {name: FrozenStack(base, name, transposed=transposed) for name in STACKS}
