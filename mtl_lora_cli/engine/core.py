"""What lies between the projections of a layer whose state runs on: the model's own code, projections left out."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from mtl_lora_cli.engine.plan import MixerPlan

Core = Callable[[Tensor], Tensor]


def core_of(layer: nn.Module, plan: MixerPlan) -> Core:
    """The forward pass of a layer's module between its projections: [S, L, Σ widths] → [S, L, v].

    Args:
        layer: a transformers layer.
        plan: of its first half; the outputs of the projections `qkv` lie side by side.
    """
    module = layer.get_submodule(plan.module)
    stand_in = _StandIn(module)
    start = 0
    for path in plan.qkv:
        projection: Any = layer.get_submodule(path)
        width = getattr(projection, "base_layer", projection).out_features
        setattr(stand_in, _inside(path, plan), _Columns(start, start + width))
        start += width
    setattr(stand_in, _inside(plan.o, plan), lambda x: x)
    return lambda x: type(module).forward(stand_in, x)


def _inside(path: str, plan: MixerPlan) -> str:
    """The name that the module has for a projection."""
    return path.removeprefix(f"{plan.module}.")


class _Columns:
    """In the place of a projection: its columns of what was computed before."""

    def __init__(self, start: int, stop: int) -> None:
        self._columns = slice(start, stop)

    def __call__(self, x: Tensor) -> Tensor:
        return x[..., self._columns]


class _StandIn:
    """A module as its own methods see it, but for what was put in the place of projections."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, MethodType) and value.__self__ is self._module:
            return MethodType(value.__func__, self)
        return value
