"""Making a tiny model's folder: its configuration, weights that matter, and a tokenizer."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .models import COMMON, VISION, Tiny

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
AUTO = "AutoConfig"


def build(model: Tiny, tokenizer: Path, folder: Path) -> Path:
    """Write the model and a tokenizer to a folder.

    Args:
        model: which.
        tokenizer: folder that holds the tokenizer's files.
        folder: new, or empty.
    """
    torch.manual_seed(0)
    made = auto_class(model).from_config(configuration(model), dtype=torch.float32)
    _let_weights_matter(made, model.gain)
    made.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(tokenizer / name, folder / name)
    return folder


def auto_class(model: Tiny) -> Any:
    """The class that loads the model as it is on the hub."""
    return AutoModelForCausalLM if model.vision is None else AutoModelForImageTextToText


def configuration(model: Tiny) -> Any:
    """What `COMMON` has of it, and its own keys."""
    kind = CONFIG_MAPPING[model.model_type]
    keys = {**_known(kind, COMMON), **model.config}
    for name, own, common in (("text", model.text, COMMON), ("vision", model.vision, VISION)):
        if own is not None:
            part = kind.sub_configs[f"{name}_config"]
            if part.__name__ == AUTO:
                part = CONFIG_MAPPING[own["model_type"]]
            keys[f"{name}_config"] = {**_known(part, common), **own}
    return kind(**copy.deepcopy(keys))  # a configuration writes into what it is given


def _known(kind: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
    fields = {one.name for one in dataclasses.fields(kind)} | set(kind.attribute_map)
    return {key: value for key, value in keys.items() if key in fields}


@torch.no_grad()
def _let_weights_matter(model: nn.Module, gain: float) -> None:
    """Matrices ~ N(0, (gain/√fan-in)²); vectors, which often start as zeros or ones, move a little."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=gain / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
