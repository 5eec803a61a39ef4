"""Putting adapters into a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from mtl_lora_cli.adapters.experts import (
    STACKS,
    MultiTaskExperts,
    MultiTaskStack,
    expert_modules,
    frozen_stacks,
)
from mtl_lora_cli.adapters.layer import (
    MultiTaskLinear,
    TaskLayer,
    fresh,
    like,
    require_declared,
    wrong,
)
from mtl_lora_cli.adapters.methods.base import Part, Role, Settings, matches, zeros
from mtl_lora_cli.adapters.routing import Routing
from mtl_lora_cli.errors import UsageError, did_you_mean

WHOLE, DECODER = "whole:", "decoder:"  # how tensors begin that belong to no adapted layer


class Adapter:
    """Handle on the adapted layers of one model, and on what learns beside them.

    Attributes:
        config: sizes and kinds.
        tasks: names in the order of their ids.
        routing: assign task ids here before calling the model.
        layers: module path in the untouched model → its adapted layer.
        shared: role → tensor that belongs to the whole model.
        whole: parameter of the untouched model → what learns in its place (`adapter.whole_modules`).
        decoders: task → the module that reads the model's features for it; none, of a language model.
        remarks: what a user may not expect of the targets, a line each.
    """

    def __init__(
        self,
        config: Settings,
        tasks: Sequence[str],
        routing: Routing,
        layers: dict[str, TaskLayer],
        shared: dict[str, nn.Parameter],
        whole: dict[str, nn.Parameter] | None = None,
    ) -> None:
        self.config = config
        self.tasks = tuple(tasks)
        self.routing = routing
        self.layers = layers
        self.shared = shared
        self.whole = whole or {}
        self.decoders: dict[str, nn.Module] = {}
        self.remarks: list[str] = []

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under their names in the adapter file: `{module path}.{role}`, `whole:{parameter}`,
        `decoder:{task}:{parameter}`."""
        named: dict[str, Tensor] = dict(self.shared)
        for path, layer in self.layers.items():
            named.update((f"{path}.{role}", getattr(layer, role)) for role in layer.roles)
        named.update((f"{WHOLE}{name}", tensor) for name, tensor in self.whole.items())
        for task, decoder in self.decoders.items():
            found = decoder.named_parameters()
            named.update((f"{DECODER}{task}:{name}", tensor) for name, tensor in found)
        return named

    def role(self, name: str) -> Role:
        """The role of one of `tensors`."""
        for start, part in ((WHOLE, "whole"), (DECODER, "decoder")):
            if name.startswith(start):
                shape = tuple(self.tensors()[name].shape)
                return Role(name, shape, zeros, cast(Part, part), added="start")
        path, _, role = name.rpartition(".")
        return self.layers[path].roles[role] if path else self.config.role(name)

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Inside the block every adapted layer is the frozen one that it was made of."""
        outer = {id(layer.outer): layer.outer for layer in self.layers.values()}
        for module in outer.values():
            module.forward = module.base_layer.forward  # type: ignore[union-attr, assignment]
        try:
            yield
        finally:
            for module in outer.values():
                del module.forward

    def trained(self) -> dict[str, Tensor]:
        """Those of `tensors` that learn: all, where none was frozen (`extend.start_beside`)."""
        return {name: tensor for name, tensor in self.tensors().items() if tensor.requires_grad}

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        return next(iter(self.tensors().values())).device

    def parameter_count(self) -> int:
        """Number of trained values."""
        return sum(tensor.numel() for tensor in self.trained().values())


def inject(
    model: nn.Module,
    config: Settings,
    tasks: Sequence[str],
    *,
    within: Sequence[str] = ("",),
    own_in: Sequence[str] | None = None,
    whole_in: Sequence[str] | None = None,
    places: Mapping[str, Sequence[str]] | None = None,
) -> Adapter:
    """Freeze the model and wrap every layer that a target names.

    A target is a whole module path, its last part or parts (`q_proj`, `mlp.up_proj`), or a pattern
    (`*.layers.1?.*.q_proj`). What `whole_modules` names likewise learns whole: of layers that both name
    the weights learn, and they get no adapter.

    Args:
        model: any.
        config: sizes and kinds.
        tasks: names in the order of their ids.
        within: paths of the modules whose layers may be adapted; by default all.
        own_in: paths of the modules in whose layers tasks may have parts of their own; None: in all.
        whole_in: paths of the modules in which something may learn whole; None: those of `within`.
        places: target → paths of the modules that it is for, where those are not `within`.

    Raises:
        UsageError: a target matches nothing, something that is no linear layer, or a tied weight.
    """
    others = places or {}
    every = [*within, *(part for some in others.values() for part in some)]
    modules = {path: module for path, module in model.named_modules() if _lies_in_one(path, every)}
    linear = {path: module for path, module in modules.items() if is_linear(module)}
    paths: dict[str, nn.Linear] = {}
    few = []
    for target in config.target_modules:
        there = others.get(target, within)
        matched = [path for path in linear if matches(path, target) and _lies_in_one(path, there)]
        if not matched:
            raise UsageError(_no_match(target, modules, linear))
        few.append(_few_of(target, matched, modules))
        paths.update((path, linear[path]) for path in matched)
    whole = whole_parameters(model, config, within if whole_in is None else whole_in)
    paths = {path: layer for path, layer in paths.items() if f"{path}.weight" not in whole}
    stacks = _stacks_of(config, modules)
    adapted = [*paths, *(f"{path}.{name}" for path in stacks for name in STACKS)]
    if adapted:
        require_adapted(config, adapted)
    _require_untied(model, paths)
    model.requires_grad_(False)
    routing = Routing(len(tasks), shared=config.streams is not None)
    some = next(layer.weight for layer in (*paths.values(), *linear.values()))
    shared = _shared(model, config, len(tasks), some)
    layers: dict[str, TaskLayer] = {}
    kinds = set()
    # In the model's order, whatever the order of the targets: the random start depends on it.
    for path in (path for path in linear if path in paths):
        parent, _, name = path.rpartition(".")
        rank = config.rank_of(path)
        own = config.at(path)
        if own_in is not None and not any(_lies_in(path, place) for place in own_in):
            own = own.common()
        layer = MultiTaskLinear(paths[path], own, routing, shared, rank)
        setattr(model.get_submodule(parent), name, layer)
        if layer.kind not in kinds:
            require_declared(layer)
        kinds.add(layer.kind)
        layers[path] = layer
    for path, module in stacks.items():
        layers.update(_on_experts(model, path, module, config, routing, shared))
    if own_in is not None and layers:
        _require_own(config, layers, own_in)
    learning = {name: learn_whole(model, name) for name in whole}
    adapter = Adapter(config, tasks, routing, layers, shared, learning)
    adapter.remarks = [one for one in few if one]
    return adapter


def _lies_in_one(path: str, places: Sequence[str]) -> bool:
    return any(not place or _lies_in(path, place) for place in places)


def _lies_in(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}.")


def _require_own(config: Settings, layers: Mapping[str, TaskLayer], own_in: Sequence[str]) -> None:
    """Refuse an adapter whose tasks differ nowhere.

    Raises:
        UsageError: no adapted layer lies where they may.
    """
    if not any(role.per_task for layer in layers.values() for role in layer.roles.values()):
        raise UsageError(
            "adapter.streams: tasks have streams in the last blocks of stages, and the adapter has no part "
            f"of tasks' own there: {', '.join(own_in)}; adapted: {', '.join(config.target_modules)}"
        )


def whole_parameters(
    model: nn.Module, config: Settings, within: Sequence[str] = ("",)
) -> tuple[str, ...]:
    """Names of the parameters that `whole_modules` names, or that lie in modules that it names.

    Raises:
        UsageError: one of its targets names nothing.
    """
    names = [
        name
        for name, _ in model.named_parameters()
        if any(not part or name.startswith(f"{part}.") for part in within)
    ]
    found: set[str] = set()
    for target in config.whole_modules:
        matched = [name for name in names if any(matches(p, target) for p in _places_of(name))]
        if not matched:
            known = sorted({path.rpartition(".")[2] for name in names for path in _places_of(name)})
            raise UsageError(
                f"adapter.whole_modules: '{target}' matches no module or parameter of the model"
                f"{did_you_mean(target, known)}"
            )
        found.update(matched)
    return tuple(name for name in names if name in found)


def _places_of(parameter: str) -> Iterator[str]:
    """The parameter's own name, and the paths of the modules that it lies in, inside out."""
    while parameter:
        yield parameter
        parameter = parameter.rpartition(".")[0]


class _Cast(nn.Module):
    """What the model reads of a parameter that learns in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, value: Tensor) -> Tensor:
        return value.to(self._dtype)


def learn_whole(model: nn.Module, name: str) -> nn.Parameter:
    """Let a parameter of a frozen model learn, in float32 at least; the model reads it in its own dtype.

    Raises:
        UsageError: it is quantised, and so has no gradient.
    """
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    value = getattr(module, own)
    if not value.is_floating_point() or getattr(value, "quant_state", None) is not None:
        raise UsageError(f"adapter.whole_modules: '{name}' is quantised and cannot learn")
    wide = like(value)["dtype"]
    learning = nn.Parameter(value.detach().to(wide, copy=True))
    setattr(module, own, learning)
    if wide != value.dtype:
        register_parametrization(module, own, _Cast(value.dtype), unsafe=True)
        learning = cast(nn.Parameter, cast(nn.ModuleDict, module.parametrizations)[own].original)
    return learning


def _stacks_of(config: Settings, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules of experts that are to be adapted, by path.

    Raises:
        UsageError: there are none, or none of a kind that is known.
    """
    if config.experts == "none":
        return {}
    if config.from_weight:
        raise UsageError(
            f"adapter.experts: {config.experts}: method {config.method} starts from the weight of a linear "
            "layer, and experts are stacks; leave the key out, or take another method"
        )
    found = dict(expert_modules(modules))
    others = [path for path in modules if path.endswith(".experts") and path not in found]
    if others and not found:
        kind = type(modules[others[0]]).__name__
        raise UsageError(
            f"adapter.experts: {config.experts}: '{others[0]}' ({kind}) does not hold its experts as "
            f"stacks {' and '.join(STACKS)}, and cannot be adapted; leave the key out"
        )
    if not found:
        raise UsageError(
            f"adapter.experts: {config.experts}: the model has no experts; leave the key out"
        )
    return found


def _on_experts(
    model: nn.Module,
    path: str,
    module: nn.Module,
    config: Settings,
    routing: Routing,
    shared: dict[str, nn.Parameter],
) -> dict[str, TaskLayer]:
    """Adapt one module of experts; its two stacks by path."""
    stacks = {}
    for name, frozen in frozen_stacks(module).items():
        own, rank = config.at(f"{path}.{name}"), config.rank_of(f"{path}.{name}")
        stacks[name] = MultiTaskStack(
            frozen, own, routing, shared, rank, each=config.experts == "each"
        )
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, MultiTaskExperts(module, stacks, routing))
    return {f"{path}.{name}": stack for name, stack in stacks.items()}


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module computes x Wᵀ + b and nothing else; bitsandbytes' layers do.

    Routers and grouped projections inherit from `nn.Linear`, and compute something else.
    """
    if not isinstance(module, nn.Linear):
        return False
    known = type(module).forward is nn.Linear.forward
    return known or type(module).__module__.startswith("bitsandbytes") or _is_product(module)


@torch.no_grad()
def _is_product(layer: nn.Linear) -> bool:
    """Whether a layer with a forward of its own computes x Wᵀ + b, from a try."""
    weight = layer.weight
    try:
        x = torch.linspace(-1, 1, 2 * layer.in_features, dtype=weight.dtype, device=weight.device)
        x = x.view(1, 2, -1)
        out, right = layer(x), nn.functional.linear(x, weight, layer.bias)
        same: bool = out.shape == right.shape
        return same and (weight.is_meta or torch.allclose(out, right))
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False


def _no_match(
    target: str, modules: Mapping[str, nn.Module], linear: Mapping[str, nn.Linear]
) -> str:
    known = sorted({path.rpartition(".")[2] for path in linear})
    others = sorted({type(m).__name__ for path, m in modules.items() if matches(path, target)})
    if any(
        matches(f"{path}.{name}", target) for path, _ in expert_modules(modules) for name in STACKS
    ):
        what = f"'{target}' matches experts, which `adapter.experts` adapts; it is no linear layer"
    elif others:
        what = f"'{target}' matches modules of class {', '.join(others)}, which cannot be adapted"
    else:
        what = f"'{target}' matches no linear layer of the model{did_you_mean(target, known)}"
    return f"adapter.target_modules: {what}; linear layers: {', '.join(known) or 'none'}"


def _few_of(target: str, matched: Sequence[str], modules: Collection[str]) -> str:
    """A remark where a target hits some of a stack's layers and not the others; else empty."""
    if "*" in target or "?" in target or "." in target:
        return ""
    stacks = {match[0] for path in matched if (match := re.match(r".*?\.\d+(?=\.)", path))}
    prefix = {stack.rpartition(".")[0] for stack in stacks}
    of = {
        match[0]
        for path in modules
        if (match := re.match(r".*?\.\d+(?=\.)", path)) and match[0].rpartition(".")[0] in prefix
    }
    return f"{target}: {len(stacks)} of {len(of)} layers" if len(stacks) < len(of) else ""


def require_adapted(config: Settings, paths: Collection[str]) -> None:
    """Refuse what is said of some of the adapted layers where it names none of them.

    Raises:
        UsageError: naming the target.
    """
    for key, targets in config.patterns().items():
        for target in targets:
            if not any(matches(path, target) for path in paths):
                raise UsageError(
                    f"adapter.{key}: '{target}' matches no adapted layer"
                    f"{did_you_mean(target, config.target_modules)}"
                )


def _require_untied(model: nn.Module, paths: dict[str, nn.Linear]) -> None:
    """Refuse a layer whose weight stands elsewhere, too: one place would be adapted, not the other."""
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            places.setdefault(id(weight), []).append(path)
    for path, module in paths.items():
        others = [other for other in places[id(module.weight)] if other != path]
        if others:
            raise UsageError(
                f"adapter.target_modules: '{path}' shares its weight with '{others[0]}' "
                "and cannot be adapted alone"
            )


def _shared(
    model: nn.Module, config: Settings, tasks: int, weight: Tensor
) -> dict[str, nn.Parameter]:
    """The method's tensors of the whole model, registered in it.

    Raises:
        UsageError: the model has something of that name.
    """
    shared = {}
    for role in config.roles_of_model(tasks):
        if hasattr(model, role.name):
            raise wrong(config, "roles_of_model", f"the model has a '{role.name}' of its own")
        shared[role.name] = nn.Parameter(fresh(config, role, **like(weight)))
        model.register_parameter(role.name, shared[role.name])
    return shared
