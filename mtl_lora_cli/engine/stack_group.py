"""One projection of all experts as the blocks use it; `group.py` is the same of linear layers."""

from __future__ import annotations

from torch import Tensor

from mtl_lora_cli.adapters.frozen_stack import FrozenStack
from mtl_lora_cli.engine.router import RouterChoice


class StackGroup:
    """The frozen weights of one projection of all experts.

    Args:
        frozen: the weights.
    """

    def __init__(self, frozen: FrozenStack) -> None:
        self.frozen = frozen

    def forward(self, x: Tensor, choice: RouterChoice) -> Tensor:
        """y [S, out] of the pairs' inputs x [S, in]."""
        return self.frozen.product(x, choice.ends, choice.expert, self.frozen.weight)

    def backward(self, dy: Tensor, choice: RouterChoice) -> Tensor:
        """dx [S, in]."""
        return self.frozen.input_gradient(dy, choice.ends, self.frozen.weight)
