"""Putting adapters into a model."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.config import AdapterConfig, matches
from mtl_lora_cli.adapters.layer import ROLES, MultiTaskLinear, Shared
from mtl_lora_cli.adapters.routing import Routing
from mtl_lora_cli.errors import UsageError, did_you_mean

SHARED = ("task_embedding", "gate_projection")  # tensors that belong to the whole model


class Adapter:
    """Handle on the adapted layers of one model.

    Attributes:
        config: sizes and kinds.
        tasks: names in the order of their ids.
        routing: assign task ids here before calling the model.
        layers: module path in the untouched model → its adapted layer.
        shared: the tensors that belong to the whole model.
    """

    def __init__(
        self,
        config: AdapterConfig,
        tasks: Sequence[str],
        routing: Routing,
        layers: dict[str, MultiTaskLinear],
        shared: Shared,
    ) -> None:
        self.config = config
        self.tasks = tuple(tasks)
        self.routing = routing
        self.layers = layers
        self.shared = shared

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under their names in the adapter file: `{module path}.{role}`."""
        named: dict[str, Tensor] = {}
        for name in SHARED:
            if getattr(self.shared, name) is not None:
                named[name] = getattr(self.shared, name)
        for path, layer in self.layers.items():
            for role in ROLES:
                if hasattr(layer, role):
                    named[f"{path}.{role}"] = getattr(layer, role)
        return named

    def trained(self) -> dict[str, Tensor]:
        """Those of `tensors` that learn: all, where none was frozen (`extend.start_beside`)."""
        return {name: tensor for name, tensor in self.tensors().items() if tensor.requires_grad}

    def parameter_count(self) -> int:
        """Number of trained values."""
        return sum(tensor.numel() for tensor in self.trained().values())


def per_task(name: str) -> bool:
    """Whether a tensor of an adapter has a row for each task; the others are shared by all tasks."""
    return name.rpartition(".")[2].startswith("task_")


def inject(model: nn.Module, config: AdapterConfig, tasks: Sequence[str]) -> Adapter:
    """Freeze the model and wrap every layer that a target names.

    A target is a whole module path, its last part or parts (`q_proj`, `mlp.up_proj`), or a pattern
    (`*.layers.1?.*.q_proj`).

    Raises:
        UsageError: a target matches nothing, something that is no linear layer, or a tied weight.
    """
    linear = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    paths: dict[str, nn.Linear] = {}
    for target in config.target_modules:
        matched = [path for path in linear if matches(path, target)]
        if not matched:
            known = sorted({path.rpartition(".")[2] for path in linear})
            raise UsageError(
                f"adapter.target_modules: '{target}' matches no linear layer of the model"
                f"{did_you_mean(target, known)}; linear layers: {', '.join(known)}"
            )
        paths.update((path, linear[path]) for path in matched)
    require_adapted(config, paths)
    _require_untied(model, paths)
    model.requires_grad_(False)
    routing = Routing(len(tasks))
    shared = _shared(model, config, len(tasks), next(iter(paths.values())).weight)
    layers = {}
    # In the model's order, whatever the order of the targets: the random start depends on it.
    for path in (path for path in linear if path in paths):
        parent, _, name = path.rpartition(".")
        rank = config.rank_of(path)
        layer = MultiTaskLinear(paths[path], config.at(path), routing, shared, rank)
        setattr(model.get_submodule(parent), name, layer)
        layers[path] = layer
    return Adapter(config, tasks, routing, layers, shared)


def require_adapted(config: AdapterConfig, paths: Collection[str]) -> None:
    """Refuse what is said of some of the adapted layers where it names none of them.

    Raises:
        UsageError: naming the target.
    """
    for key in ("rank_pattern", "task_modules"):
        for target in getattr(config, key) or ():
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


def _shared(model: nn.Module, config: AdapterConfig, tasks: int, like: Tensor) -> Shared:
    """The task embedding e_t ~ N(0, 1), and moelora's one gate, like a linear layer's weight."""
    shared = Shared()
    if config.embedded:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        size = config.embedding_size or 0
        start = torch.randn(tasks, size, dtype=dtype, device=like.device)
        shared.task_embedding = nn.Parameter(start)
        if config.method == "moelora":
            gate = torch.empty(config.ups, size, dtype=dtype, device=like.device)
            nn.init.kaiming_uniform_(gate, a=5**0.5)
            shared.gate_projection = nn.Parameter(gate)
    for name in SHARED:
        parameter = getattr(shared, name)
        if parameter is not None:
            model.register_parameter(name, parameter)
    return shared
