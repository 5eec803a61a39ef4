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

    def product(self, x: Tensor, ends: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        """y [S, out].

        Args:
            x: [S, in].
            ends: int32 [E], where each expert's pairs end.
            expert: int64 [S], ascending.
            weight: `weight`, as a backward pass should keep it.
        """
        y = grouped(x, dense_stack(weight, x.dtype), ends, transposed=self.transposed)
        bias = self.bias
        return y if bias is None else y.add_(bias.to(y.dtype)[expert])

    def input_gradient(self, dy: Tensor, ends: Tensor, weight: Tensor) -> Tensor:
        """dx [S, in] from dy [S, out]."""
        return grouped(dy, dense_stack(weight, dy.dtype), ends, transposed=not self.transposed)

    def bias_product(self, dy: Tensor, expert: Tensor) -> Tensor | None:
        """⟨dy_s, b_e⟩ [S] in float32 or better, or None without a bias."""
        if self.bias is None:
            return None
        wide = torch.promote_types(dy.dtype, torch.float32)
        return (dy.to(wide) * self.bias.to(wide)[expert]).sum(-1)


def stack_shape(weight: Tensor) -> tuple[int, int, int]:
    """Of a stack [E, rows, columns], whether it is quantised or not."""
    state = getattr(weight, "quant_state", None)
    experts, rows, columns = weight.shape if state is None else state.shape
    return experts, rows, columns
