"""What PEFT makes of the names in an adapter's configuration: which modules of the model it adapts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export.weight_names import wrapper_class
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.load import skeleton

PREFIX = "base_model.model."  # PEFT's name for what it wraps


def beside_the_text(
    base: BaseModel, weights: Iterable[str], wrapped: Mapping[str, str], targets: Sequence[str]
) -> str | None:
    """An expression of the modules that PEFT would adapt, too, by their names, such as a vision tower's.

    Each is named by the shortest path to it that leads to no adapted layer.

    Args:
        base: the base model.
        weights: that are adapted.
        wrapped: see `write_peft`.
        targets: names of the adapted layers.
    """
    adapted = {name.removesuffix(".weight") for name in (*weights, *wrapped.values())}
    leading = {above for path in adapted for above in _prefixes(path)}
    named = {*targets, *(adapted if any("." in target for target in targets) else ())}
    beside = set()
    for model in _models(base):
        for path, _ in model.named_modules():
            if path not in leading and named.intersection(_suffixes(path)):
                beside.add(next(above for above in _prefixes(path) if above not in leading))
    return f"({'|'.join(map(re.escape, sorted(beside)))})(\\..*)?" if beside else None


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
            name for name in names if name.removeprefix(PREFIX).rpartition(".lora_")[0] in paths
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
        return {name.replace(".default.", ".") for name in names if ".lora_" in name}

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
