"""Experts in 4 bits: bitsandbytes quantises linear layers alone, and experts are most of a mixture's weights.

transformers reads, stacks and quantises one weight after another, so that the model never lies there in 16
bits. Its quantiser is told of the stacks, too, while it loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.experts import STACKS, expert_modules
from mtl_lora_cli.adapters.frozen_stack import quantise_stack

_KIND = "bitsandbytes_4bit"  # transformers' name of its quantiser


@contextmanager
def quantising_stacks(quantization: str) -> Iterator[None]:
    """Inside, transformers' quantiser of 4 bits quantises stacks of experts, too; for other kinds nothing."""
    if quantization not in ("nf4", "fp4"):
        yield
        return
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as MAPPING

    own = MAPPING[_KIND]
    MAPPING[_KIND] = _with_stacks(own)
    try:
        yield
    finally:
        MAPPING[_KIND] = own


def quantise_experts(model: nn.Module, quantization: str, storage: torch.dtype) -> None:
    """Quantise the stacks of a model that are in 16 bits yet, one after another."""
    if quantization not in ("nf4", "fp4"):
        return
    for _, module in expert_modules(dict(model.named_modules())):
        for name in STACKS:
            weight = module._parameters[name]
            assert weight is not None
            if getattr(weight, "quant_state", None) is None and not weight.is_meta:
                module._parameters[name] = quantise_stack(weight.data, quantization, storage)


def _with_stacks(own: Any) -> Any:
    """transformers' quantiser, which takes stacks, too."""

    class WithStacks(own):  # type: ignore[misc]
        def param_needs_quantization(self, model: Any, param_name: str, **named: Any) -> bool:
            found = super().param_needs_quantization(model, param_name, **named)
            return bool(found) or _is_expert_stack(model, param_name)

        def get_quantize_ops(self) -> Any:
            return _quantising(super().get_quantize_ops(), self.quantization_config)

    return WithStacks


def _is_expert_stack(model: Any, name: str) -> bool:
    path, _, last = name.rpartition(".")
    if last not in STACKS:
        return False
    return bool(dict(expert_modules({path: model.get_submodule(path)})))


def _quantising(own: Any, config: Any) -> Any:
    """transformers' operation on a weight that was read, which knows stacks, too."""
    take: Any = own.convert

    def convert(input_dict: dict[str, Any], *given: Any, **named: Any) -> dict[str, Any]:
        model = named.get("model")
        stacks = {name for name in input_dict if _is_expert_stack(model, name)}
        others = {name: value for name, value in input_dict.items() if name not in stacks}
        found = take(others, *given, **named) if others else {}
        for name in stacks:
            value = input_dict[name]
            found[name] = _quantised(value[0] if isinstance(value, list) else value, config)
        return found

    own.convert = convert
    return own


def _quantised(weight: Tensor, config: Any) -> Tensor:
    if weight.is_meta:  # of a model without weights
        return weight
    return quantise_stack(weight, config.bnb_4bit_quant_type, config.bnb_4bit_quant_storage)
