"""The frozen weights of one projection of all experts, which transformers keeps in one stack.

    y_s = W_e x_s + b_e        dx_s = W_eᵀ dy_s        e the expert of pair s

Pairs of a position and an expert stand sorted by their experts. A stack in NF4 is expanded into the
buffer that all layers use. No gradient of W is ever computed.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.frozen import dense_stack
from mtl_lora_cli.adapters.pairs import Pairs
from mtl_lora_cli.kernels.grouped import grouped


class FrozenStack:
    """See the module. The parameters stay those of the model's own module, and are read when they are used.

    Args:
        module: with `gate_up_proj` and `down_proj`, and perhaps `gate_up_proj_bias` and so on.
        name: of the one.
        transposed: each matrix is stored as [in, out].

    Attributes:
        experts, out, width: W_e is [out, width].
    """

    def __init__(self, module: nn.Module, name: str, *, transposed: bool) -> None:
        self._module = module
        self._name = name
        self.transposed = transposed
        self.experts, *sides = stack_shape(self.weight)
        self.width, self.out = sides if transposed else reversed(sides)

    @property
    def weight(self) -> Tensor:
        """The parameter, [E, out, in] or [E, in, out]; or its values of 4 bits."""
        return cast(Tensor, getattr(self._module, self._name))

    @property
    def values(self) -> int:
        """Numbers in the stack."""
        return self.experts * self.out * self.width

    @property
    def bias(self) -> Tensor | None:
        """b [E, out]."""
        return getattr(self._module, f"{self._name}_bias", None)

    def product(self, x: Tensor, pairs: Pairs, weight: Tensor, *, biased: bool = True) -> Tensor:
        """y [S, out].

        Args:
            x: [S, in].
            pairs: whose inputs they are.
            weight: `weight`, as a backward pass should keep it.
            biased: add b_e.
        """
        y = grouped(x, dense_stack(weight, x.dtype), pairs.ends, transposed=self.transposed)
        bias = self.bias if biased else None
        return y if bias is None else y.add_(bias.to(y.dtype)[pairs.expert])

    def input_gradient(self, dy: Tensor, pairs: Pairs, weight: Tensor) -> Tensor:
        """dx [S, in] from dy [S, out]."""
        return grouped(
            dy, dense_stack(weight, dy.dtype), pairs.ends, transposed=not self.transposed
        )


def quantise_stack(weight: Tensor, kind: str, storage: torch.dtype = torch.uint8) -> nn.Parameter:
    """A stack in 4 bits by bitsandbytes, with double quantisation, as it quantises a linear layer.

    Args:
        weight: [E, rows, columns], where it is to be.
        kind: `nf4` or `fp4`.
        storage: in what 4-bit values are kept; see `models/load.py`.
    """
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Params4bit

    packed, state = quantize_4bit(
        weight.contiguous(),
        blocksize=64,
        compress_statistics=True,
        quant_type=kind,
        quant_storage=storage,
    )
    found: nn.Parameter = Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        quant_type=kind,
        quant_storage=storage,
        bnb_quantized=True,
    )
    return found


def dense_dtype(weight: Tensor) -> torch.dtype:
    """What a stack is multiplied in."""
    state = getattr(weight, "quant_state", None)
    return weight.dtype if state is None else cast(torch.dtype, state.dtype)


def is_stack(weight: Tensor) -> bool:
    """Whether a parameter is a stack of matrices, quantised or not."""
    state = getattr(weight, "quant_state", None)
    return len(weight.shape if state is None else state.shape) == 3


def stack_shape(weight: Tensor) -> tuple[int, int, int]:
    """Of a stack [E, rows, columns], whether it is quantised or not."""
    state = getattr(weight, "quant_state", None)
    experts, rows, columns = weight.shape if state is None else state.shape
    return experts, rows, columns
