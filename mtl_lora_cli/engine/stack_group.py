"""One projection of all experts, adapted or not, as the blocks use it; `group.py` is the same of linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtl_lora_cli.adapters.experts import MultiTaskStack
from mtl_lora_cli.adapters.frozen import step_of
from mtl_lora_cli.adapters.frozen_stack import FrozenStack, dense_dtype
from mtl_lora_cli.adapters.function import Widths
from mtl_lora_cli.adapters.pairs import Pairs
from mtl_lora_cli.adapters.routing import Slots
from mtl_lora_cli.engine.group import Tape
from mtl_lora_cli.kernels.grouped import together


class StackGradients(NamedTuple):
    """What a backward pass has found before A's gradient is asked for."""

    dz: Tensor
    dmixing: Tensor | None
    dup: Tensor


class StackGroup:
    """See the module.

    Args:
        frozen: the weights.
        layer: the adapter on them, or None.
        biased: add the frozen biases.

    Attributes:
        adapted, all_tasks: as of `Group`.
    """

    def __init__(self, frozen: FrozenStack, layer: MultiTaskStack | None, *, biased: bool) -> None:
        self.frozen = frozen
        self.adapted = [] if layer is None else [layer]
        self.all_tasks = False
        self._biased = biased
        self._products = None if layer is None else layer.stack_products()

    @property
    def count(self) -> int:
        """Number of `tensors`."""
        return 3 * len(self.adapted)

    def tensors(self, mixing: Tensor | None, slots: Slots) -> list[Tensor | None]:
        """What autograd must know of: M, A, B."""
        return [one for layer in self.adapted for one in (mixing, *layer.factors(slots.wanted))]

    @property
    def asks_back(self) -> bool:
        """Whether a pass waits for where the experts' pairs end; a CUDA graph cannot be made of it."""
        dtype = dense_dtype(self.frozen.weight)
        sides = [self.frozen.width, self.frozen.out]
        for layer in self.adapted:
            if layer.stacked:
                down, up = (one.shape[-3:] for one in layer.factors(None))
                sides += Widths.of([down], [up], step_of(layer.lora_A, dtype))
        return not together(dtype, sides)

    def forward(
        self, x: Tensor, tensors: Sequence[Any], pairs: Pairs, slots: Slots, training: bool
    ) -> tuple[Tensor, Tape | None]:
        """y [S, out] of the pairs' inputs x [S, in], and what the backward pass needs of the adapter.

        Args:
            x, pairs: of the pairs.
            tensors: from `tensors`.
            slots: of the positions.
            training: whether dropout is on.
        """
        y = self._frozen_product(x, pairs)
        products = self._products
        if products is None or slots.count == 0:
            return y, None
        mixing, down, up = tensors
        factors = products.factors(x.dtype, down, up, mixing)
        mask = products.mask(x) if training else None
        z = products.narrow(x, mask, factors, pairs)
        tape = Tape(factors, z, mask, (down.shape, up.shape))
        self._add_up(y, tape, pairs, slots)
        return y, tape

    def again(self, x: Tensor, tape: Tape | None, pairs: Pairs, slots: Slots) -> Tensor:
        """y once more."""
        y = self._frozen_product(x, pairs)
        if tape is not None:
            self._add_up(y, tape, pairs, slots)
        return y

    def backward(
        self, dy: Tensor, tape: Tape | None, pairs: Pairs, slots: Slots
    ) -> tuple[Tensor, StackGradients | None]:
        """dx [S, in], and the adapter's gradients, that of A unfinished."""
        dx = self.frozen.input_gradient(dy, pairs, self.frozen.weight)
        products = self._products
        if products is None or tape is None:
            return dx, None
        own = self._pair_slots(pairs, slots)
        found = StackGradients(*products.gradients(dy, tape.z, tape.factors, own, pairs))
        products.add_input_gradient(dx, found.dz, tape.mask, tape.factors, pairs)
        return dx, found

    def finish(
        self, gradients: StackGradients | None, tape: Tape | None, x: Tensor, pairs: Pairs
    ) -> list[Tensor | None]:
        """The gradients of `tensors`, with x [S, in] of the forward pass."""
        products = self._products
        if products is None or gradients is None or tape is None:
            return [None] * self.count
        ddown = products.down_gradient(gradients.dz, x, tape.mask, pairs)
        dtype: torch.dtype = self.adapted[0].lora_A.dtype
        down, up = tape.shapes
        found = products.parameter_gradients(down, up, dtype, ddown, gradients.dup)
        return [gradients.dmixing, *found]

    def _frozen_product(self, x: Tensor, pairs: Pairs) -> Tensor:
        return self.frozen.product(x, pairs, self.frozen.weight, biased=self._biased)

    def _add_up(self, y: Tensor, tape: Tape, pairs: Pairs, slots: Slots) -> None:
        assert self._products is not None
        u = self._products.spread(tape.z, tape.factors, self._pair_slots(pairs, slots))
        self._products.add_up(y, u, tape.factors, pairs)

    def _pair_slots(self, pairs: Pairs, slots: Slots) -> Slots:
        return pairs.slots(slots, each=self.adapted[0].stacked)
