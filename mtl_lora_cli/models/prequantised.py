"""Base models whose files are quantised already: which are loaded, as what, and which are refused."""

from __future__ import annotations

import json
from typing import Any

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.files import CONFIG

# Expanded while they are loaded: their own layers have no gradient, or none on every device.
_EXPANDED = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
_KEPT = "bitsandbytes"
_INSTEAD = "use the model that it was made from, and `quantization: nf4` for 4 bits"


def method_of(base: BaseModel) -> str | None:
    """How a base model's files are quantised, as transformers calls it; None: they are not."""
    config = json.loads((base.folder / CONFIG).read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):  # a wrapper's, or of its part that reads
        found = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(found, dict):
            return str(found.get("quant_method", _KEPT))  # which was the only one once
    return None


def kept_quantised(base: BaseModel) -> bool:
    """Whether a base model's files are quantised and its weights stay so when they are loaded."""
    return method_of(base) == _KEPT


def expanding(base: BaseModel, quantization: str) -> Any:
    """What transformers is told of a base model that is quantised already; None: what its files say.

    Args:
        base: which.
        quantization: that the recipe asks for.

    Raises:
        UsageError: such a model is not trained around here, or it would be quantised twice.
    """
    method = method_of(base)
    if method is None:
        return None
    if quantization != "none":
        raise UsageError(
            f"quantization: {quantization}: the base model '{base.name}' is quantised already "
            f"({method}); leave the key out, or use the model that it was made from"
        )
    if method == _KEPT:
        return None
    if method not in _EXPANDED:
        raise UsageError(
            f"base_model: '{base.name}' is quantised already ({method}), and such weights are not "
            f"trained around here; {_INSTEAD}"
        )
    import transformers

    return getattr(transformers, _EXPANDED[method])(dequantize=True)
