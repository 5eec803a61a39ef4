"""Putting adapters into a model."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.config import AdapterConfig
from mtl_lora_cli.adapters.layer import ROLES, MultiTaskLinear
from mtl_lora_cli.adapters.routing import Routing
from mtl_lora_cli.errors import UsageError, did_you_mean

EMBEDDING = "task_embedding"  # the one tensor that belongs to the whole model


class Adapter:
    """Handle on the adapted layers of one model.

    Attributes:
        config: sizes and kinds.
        tasks: names in the order of their ids.
        routing: assign task ids here before calling the model.
        layers: module path in the untouched model → its adapted layer.
        task_embedding: e [T, d], where `config.gate` is `embedding`.
    """

    def __init__(
        self,
        config: AdapterConfig,
        tasks: Sequence[str],
        routing: Routing,
        layers: dict[str, MultiTaskLinear],
        task_embedding: nn.Parameter | None,
    ) -> None:
        self.config = config
        self.tasks = tuple(tasks)
        self.routing = routing
        self.layers = layers
        self.task_embedding = task_embedding

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors under their names in the adapter file: `{module path}.{role}`."""
        named: dict[str, Tensor] = {}
        if self.task_embedding is not None:
            named[EMBEDDING] = self.task_embedding
        for path, layer in self.layers.items():
            for role in ROLES:
                if hasattr(layer, role):
                    named[f"{path}.{role}"] = getattr(layer, role)
        return named

    def parameter_count(self) -> int:
        """Number of trained values."""
        return sum(tensor.numel() for tensor in self.tensors().values())


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
        matched = [path for path in linear if _matches(path, target)]
        if not matched:
            known = sorted({path.rpartition(".")[2] for path in linear})
            raise UsageError(
                f"adapter.target_modules: '{target}' matches no linear layer of the model"
                f"{did_you_mean(target, known)}; linear layers: {', '.join(known)}"
            )
        paths.update((path, linear[path]) for path in matched)
    _require_untied(model, paths)
    model.requires_grad_(False)
    routing = Routing(len(tasks))
    task_embedding = None
    if config.routed and config.gate == "embedding":
        some = next(iter(paths.values())).weight
        dtype = torch.float64 if some.dtype == torch.float64 else torch.float32
        start = torch.randn(len(tasks), config.embedding_size, dtype=dtype, device=some.device)
        task_embedding = nn.Parameter(start)
        model.register_parameter(EMBEDDING, task_embedding)
    layers = {}
    # In the model's order, whatever the order of the targets: the random start depends on it.
    for path in (path for path in linear if path in paths):
        parent, _, name = path.rpartition(".")
        layer = MultiTaskLinear(paths[path], config, routing, task_embedding)
        setattr(model.get_submodule(parent), name, layer)
        layers[path] = layer
    return Adapter(config, tasks, routing, layers, task_embedding)


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


def _matches(path: str, target: str) -> bool:
    if "*" in target or "?" in target:
        return fnmatchcase(path, target)
    return path == target or path.endswith("." + target)
