"""The frozen weights of projections that read one input, as one matrix.

    W = [W_1; …; W_J]  [Σ out_j, in]        y = x Wᵀ + b        dx = dy W

One product for q, k and v, or for gate and up, instead of two or three. Dense weights are laid side
by side once; 4-bit weights are expanded into one buffer that every layer uses again. No gradient of
W is ever computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_lora_cli.kernels import fp8
from mtl_lora_cli.kernels.nf4 import expand

_buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def dense_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] as numbers: itself, or a 4-bit bitsandbytes weight expanded."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.to(dtype)
    rows, columns = state.shape
    return expand(weight, state, torch.empty(rows, columns, dtype=dtype, device=weight.device))


def is_four_bit(layer: nn.Linear) -> bool:
    """Whether the layer's weight is a quantised one of bitsandbytes."""
    return getattr(layer.weight, "quant_state", None) is not None


class FrozenWeights:
    """See the module. The layers keep their parameters; nothing is registered here.

    Args:
        layers: the projections, all of one input size, in the order of their outputs.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)
        ends = torch.tensor([0, *(layer.out_features for layer in layers)]).cumsum(0).tolist()
        self.spans = tuple(pairwise(ends))
        self.shape = (ends[-1], layers[0].in_features)
        self._together: Tensor | None = None
        self._rows: tuple[fp8.Rows, fp8.Rows] | None = None

    def weights(self) -> tuple[Tensor, ...]:
        """The layers' own parameters, as a backward pass should keep them."""
        return tuple(layer.weight for layer in self.layers)

    def lay_together(self) -> None:
        """Move dense weights of several layers into one piece of memory, each a view of its part."""
        if len(self.layers) == 1 or any(is_four_bit(layer) for layer in self.layers):
            return
        together = torch.empty(
            self.shape, dtype=self.layers[0].weight.dtype, device=self.layers[0].weight.device
        )
        with torch.no_grad():
            for layer, (start, stop) in zip(self.layers, self.spans, strict=True):
                together[start:stop].copy_(layer.weight)
                layer.weight.data = together[start:stop]
        self._together = together

    def round_to_fp8(self) -> float:
        """From now on multiply in 8-bit floats (`kernels/fp8.py`), forward and backward.

        Two copies are kept, W scaled by rows and Wᵀ scaled by rows: each product wants the scale
        along its output.

        Returns:
            ‖W − rounded W‖ / ‖W‖ of the forward copy.
        """
        dense = self._dense(self.weights(), self._dtype())
        forward, backward = fp8.to_rows(dense), fp8.to_rows(dense.T.contiguous())
        self._rows = forward, backward
        rounded = forward.values.to(dense.dtype) * forward.scale.to(dense.dtype)
        return float((rounded - dense).norm() / dense.norm())

    def _dtype(self) -> torch.dtype:
        weight = self.layers[0].weight
        state = getattr(weight, "quant_state", None)
        return weight.dtype if state is None else state.dtype

    def bias(self) -> Tensor | None:
        """b [Σ out_j], or None where no layer has one."""
        biases = [layer.bias for layer in self.layers]
        if all(bias is None for bias in biases):
            return None
        if len(biases) == 1:
            return biases[0]
        parts = [
            self.layers[0].weight.new_zeros(layer.out_features) if bias is None else bias
            for layer, bias in zip(self.layers, biases, strict=True)
        ]
        return torch.cat(list(parts))

    def product(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """y = x Wᵀ + b: x [N, in] → [N, Σ out_j]."""
        if self._rows is not None:
            return fp8.product(fp8.to_rows(x), self._rows[0], x.dtype, self.bias())
        return F.linear(x, self._dense(weights, x.dtype), self.bias())

    def input_gradient(self, dy: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """dx = dy W: dy [N, Σ out_j] → [N, in]."""
        if self._rows is not None:
            return fp8.product(fp8.to_rows(dy), self._rows[1], dy.dtype)
        return dy @ self._dense(weights, dy.dtype)

    def _dense(self, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        if len(weights) == 1 and getattr(weights[0], "quant_state", None) is None:
            return weights[0].to(dtype)
        if self._together is not None:
            return self._together.to(dtype)
        out = _buffer(self.shape, weights[0].device, dtype)
        for weight, (start, stop) in zip(weights, self.spans, strict=True):
            state = getattr(weight, "quant_state", None)
            if state is None:
                out[start:stop].copy_(weight)
            else:
                expand(weight, state, out[start:stop])
        return out


def _buffer(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Memory for one expanded matrix; whoever asks next gets the same."""
    key, wanted = (device, dtype), shape[0] * shape[1]
    if key not in _buffers or _buffers[key].numel() < wanted:
        _buffers[key] = torch.empty(wanted, dtype=dtype, device=device)
    return _buffers[key][:wanted].view(shape)
