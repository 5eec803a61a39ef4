"""A frozen base model of a given shape with random weights, made where it computes.

No weights are read: a model of eight billion is there in seconds. In 4 bit, one layer after the
other is filled and quantised, so that memory never holds the whole model in 16 bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.experts import STACKS, expert_modules
from mtl_lora_cli.adapters.frozen_stack import quantise_stack
from mtl_lora_cli.engine.plan import text_body
from mtl_lora_cli.errors import UsageError


def random_model(
    config: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str,
    attention: str,
    storage: torch.dtype = torch.uint8,
) -> Any:
    """A causal language model in evaluation mode, no weight of which asks for a gradient.

    Args:
        config: transformers' configuration of it.
        dtype: of the weights, and of the computation where they are 4-bit.
        device: where they are made.
        quantization: `none`, or `nf4` (bitsandbytes, double quantisation) for all linear layers
            but the head, as transformers does it.
        attention: transformers' name of an attention implementation.
        storage: in what 4-bit values are kept; see `models/load.py`.

    Raises:
        UsageError: transformers knows no causal language model of this configuration.
    """
    model = empty_model(config, dtype=dtype, attention=attention)
    spread = float(getattr(config, "initializer_range", 0.02))
    four_bit = {id(m) for m in layer_linears(model)} if quantization == "nf4" else set()
    made: dict[int, nn.Parameter] = {}  # a tied weight is one parameter in two places
    for path, module in list(model.named_modules()):
        _compute_buffers(model, module, device)
        for name, parameter in list(module.named_parameters(recurse=False)):
            known = made.get(id(parameter))
            if known is None:
                values = _values(parameter.shape, name, spread, dtype, device)
                known = nn.Parameter(values, requires_grad=False)
                if id(module) not in four_bit:  # what is quantised must not be kept in 16 bit
                    made[id(parameter)] = known
            setattr(module, name, known)
            del known
        if quantization == "nf4":
            _four_bit_stacks(module, storage)
        if id(module) in four_bit:
            _replace(model, path, _four_bit(module, dtype, device, storage))
    return model.requires_grad_(False).eval()


def _compute_buffers(model: Any, module: nn.Module, device: torch.device) -> None:
    """Give a module's buffers, such as rotary frequencies, the values that follow from its configuration.

    transformers does it by the model's own initialisation, which leaves weights on the meta device alone.
    """
    names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
    for name in names:
        module._buffers[name] = torch.empty_like(module._buffers[name], device=device)  # type: ignore[arg-type]
    if names:
        model._init_weights(module)


def empty_model(config: Any, *, dtype: torch.dtype, attention: str = "eager") -> Any:
    """The model on the meta device: shapes without memory.

    Raises:
        UsageError: transformers knows no causal language model of this configuration.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention
            )
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        if reason.startswith("Unrecognized configuration class"):  # and then all that it knows
            reason = f"a {config.model_type} is none; bench measures language models"
        raise UsageError(f"--shape: no causal language model can be made of it: {reason}") from None


def layer_linears(model: Any) -> list[nn.Linear]:
    """The matrix products of the layers that read text: every linear layer but the head."""
    head = model.get_output_embeddings()
    inside = text_body(model).modules()
    return [m for m in inside if isinstance(m, nn.Linear) and m is not head]


def _values(
    shape: torch.Size, name: str, spread: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Normal numbers for matrices; a norm's weight is 1 and a bias 0."""
    values = torch.empty(shape, dtype=dtype, device=device)
    if len(shape) > 1:
        return values.normal_(0.0, spread)
    return values.fill_(0.0 if name == "bias" else 1.0)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _four_bit_stacks(module: nn.Module, storage: torch.dtype) -> None:
    """The stacks of a module of experts in 4 bits."""
    for _, experts in expert_modules({"": module}):
        for name in STACKS:
            weight = experts._parameters[name]
            assert weight is not None
            experts._parameters[name] = quantise_stack(weight.data, "nf4", storage)


def _four_bit(
    layer: Any, dtype: torch.dtype, device: torch.device, storage: torch.dtype
) -> nn.Module:
    """The layer as bitsandbytes' `Linear4bit`; quantised at once, its 16-bit weight let go."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    new = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=storage,
        device="meta",
    )
    weight = Params4bit(
        layer.weight.data,
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=storage,
    )
    new.weight = weight.to(device)
    if layer.bias is not None:
        new.bias = layer.bias
    del layer.weight
    return new
