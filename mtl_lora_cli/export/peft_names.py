"""What PEFT is told of an adapter's layers, so that it finds these in the model and no others.

PEFT takes a target for every module whose path ends in it, in a vision tower, too, and renames what a file
holds by transformers' rules of loading. Three things follow. Modules that would be hit and are not adapted
are excluded by name. A tensor stands there under a second name where the first would be renamed, or is
another one in the wrapper around a model for text. And in models whose experts are fused, `gate_proj` and
the like are names of experts to PEFT: dense layers and shared experts that are called so are named as
parameters, one by one, and so are the stacks of experts themselves. Then PEFT itself is asked.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export.weight_names import weight_names, wrapper_class, wrapper_names
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.load import skeleton

PREFIX = "base_model.model."  # PEFT's name for what it wraps


# What PEFT takes for parts of experts in a model that has them fused, and how those are called there.
_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
_FUSED = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class PeftNames:
    """See the module.

    Attributes:
        targets: modules: last names, or whole paths.
        also: weight of the model → a second name of it.
        parameters: weights that are named one by one, by their paths.
        excluded: expression of modules that a target hits and that are not adapted.
        stacks: stacks of experts → where PEFT puts their tensors, and whether they are stored transposed.
    """

    targets: Sequence[str]
    also: Mapping[str, str] = field(default_factory=dict)
    parameters: Sequence[str] = ()
    excluded: str | None = None
    stacks: Mapping[str, tuple[str, bool]] = field(default_factory=dict)

    def of(self, weight: str) -> list[str]:
        """The names of a weight."""
        return list(dict.fromkeys((weight, self.also.get(weight, weight))))


def peft_names(base: BaseModel, weights: Iterable[str], targets: Sequence[str]) -> PeftNames:
    """What PEFT is told of adapted weights.

    Args:
        base: the base model.
        weights: that are adapted, as the model names them.
        targets: last names of their layers, or whole paths.
    """
    stacks = _stacks(base, [weight for weight in weights if not weight.endswith(".weight")])
    weights = [weight for weight in weights if weight not in stacks]
    names = weight_names(base)
    again = {weight: names.tensor(weight) for weight in weights if weight in names.renamed}
    also = {**again, **wrapper_names(base, weights)}
    paths = [name.removesuffix(".weight") for name in (*weights, *also.values())]
    if any("." in target for target in targets):
        targets = list(dict.fromkeys(paths))
    parameters: list[str] = []
    if _has_fused_experts(skeleton(base)):
        parameters = [f"{path}.weight" for path in dict.fromkeys(paths) if _last(path) in _EXPERTS]
        targets = [target for target in targets if _last(target) not in _EXPERTS]
    parameters += stacks
    return PeftNames(targets, also, parameters, _beside(base, paths, targets), stacks)


def _stacks(base: BaseModel, weights: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """PEFT wraps a module once for each of its parameters, the first one innermost."""
    model = skeleton(base) if weights else None
    found: dict[str, tuple[str, bool]] = {}
    for weight in weights:
        path, _, name = weight.rpartition(".")
        module: Any = model.get_submodule(path)  # type: ignore[union-attr]
        own = [one for one in module._parameters if f"{path}.{one}" in weights]
        around = ".base_layer" * (len(own) - 1 - own.index(name))
        found[weight] = (f"{path}{around}", bool(module.is_transposed))
    return found


def _has_fused_experts(model: Any) -> bool:
    return any(
        parameter.ndim == 3 and _last(name) in _FUSED
        for name, parameter in model.named_parameters()
    )


def _beside(base: BaseModel, adapted: Iterable[str], targets: Sequence[str]) -> str | None:
    """An expression of the modules that a target hits without being adapted, such as a vision tower's.

    Each is named by the shortest path to it that leads to no adapted layer.
    """
    leading = {above for path in adapted for above in _prefixes(path)}
    hit, beside = set(targets), set()
    for model in _models(base):
        for path, _ in model.named_modules():
            if path not in leading and hit.intersection(_suffixes(path)):
                beside.add(next(above for above in _prefixes(path) if above not in leading))
    return f"({'|'.join(map(re.escape, sorted(beside)))})(\\..*)?" if beside else None


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _prefixes(path: str) -> list[str]:
    """A module's path from its first part to all of it: a, a.b, a.b.c."""
    return list(accumulate(path.split("."), lambda above, part: f"{above}.{part}"))


def _suffixes(path: str) -> list[str]:
    """A module's path and what it ends in: a.b.c, b.c, c; PEFT takes a target for any of them."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def require_named(base: BaseModel, folder: Path) -> None:
    """Refuse an adapter that PEFT would put on other layers than it was trained on.

    PEFT takes some names for a mixture's experts, whatever else is called so, and keeps off layers that
    some models read past. It is asked, on the model without weights.

    Args:
        base: the base model.
        folder: with the adapter's two files.

    Raises:
        UsageError: PEFT cannot adapt these layers by name.
    """
    if find_spec("peft") is None:
        return
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    for model in _models(base):
        paths = {path for path, _ in model.named_modules()}
        expected = {
            name
            for name in names
            if ".lora_" not in name  # a module that is saved whole
            or name.removeprefix(PREFIX).rpartition(".lora_")[0].removesuffix(".base_layer")
            in paths
        }
        reason = _misread(model, folder, expected)
        if reason is not None:
            raise UsageError(
                f"export --format peft: PEFT cannot adapt these layers of a model of type "
                f"'{model.config.model_type}': {reason}; mtl-lora merge can"
            )


def _misread(model: Any, folder: Path, expected: set[str]) -> str | None:
    """Why PEFT puts other tensors than these into a model without weights, or None."""
    from peft import PeftConfig, get_peft_model

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(model, PeftConfig.from_pretrained(str(folder)))
            loaded = wrapped.load_adapter(str(folder), "default", torch_device="cpu")
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        return " ".join(str(error).split())[:300]

    def as_written(names: Iterable[str]) -> set[str]:
        plain = (
            name.replace(".modules_to_save.default.", ".").replace(".default.", ".")
            for name in names
            if ".lora_" in name or ".modules_to_save." in name
        )
        return {name.replace("_magnitude_vector.weight", "_magnitude_vector") for name in plain}

    made = as_written(wrapped.state_dict())
    unread = expected - made | expected & as_written(loaded.unexpected_keys)
    added = made - expected | as_written(loaded.missing_keys)
    if unread:
        return f"it does not read '{min(unread)}' ({len(unread)} of {len(expected)} tensors)"
    return f"it wants '{min(added)}', too" if added else None


def _models(base: BaseModel) -> Iterator[Any]:
    """The modules that PEFT may be given, without weights: as we load them, and as the hub has them."""
    for kind in dict.fromkeys((None, wrapper_class(base))):
        yield skeleton(base, kind)
