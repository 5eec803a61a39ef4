"""Methods whose start follows from the frozen weights: they are asked once, before anything is learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.adapters.layer import MultiTaskLinear
from mtl_lora_cli.errors import UsageError


@torch.no_grad()
def start_from_weights(adapter: Adapter) -> None:
    """Set what a method takes from the weights (`Settings.starts`); nothing, of most methods.

    Raises:
        UsageError: a weight is quantised, so that it is not what the model was made of.
    """
    for path, layer in adapter.layers.items():
        if not layer.config.from_weight:
            continue
        assert isinstance(layer, MultiTaskLinear), "refused where it is made"
        weight = _plain(layer.base_layer, path, layer.config.method)
        if layer.rank > min(weight.shape):
            raise UsageError(
                f"adapter.rank: '{path}' has a weight {list(weight.shape)}: its rank is less than {layer.rank}"
            )
        for name, value in layer.config.starts(weight, layer.rank).items():
            getattr(layer, name).copy_(value)


def _plain(layer: nn.Linear, path: str, method: str) -> Tensor:
    """W [out, in], float64 where it is, otherwise float32."""
    weight = layer.weight.detach()
    if not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None:
        raise UsageError(
            f"adapter.method: {method} starts from the weights, and '{path}' is quantised; use "
            "quantization: none, or another method"
        )
    return weight if weight.dtype == torch.float64 else weight.float()
