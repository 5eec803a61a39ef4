"""Projections of one input, some or all of them adapted, as one product both ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.adapters.frozen import FrozenWeights, Room
from mtl_lora_cli.adapters.function import AdapterProducts, Factors, Widths
from mtl_lora_cli.adapters.layer import MultiTaskLinear
from mtl_lora_cli.adapters.routing import Slots
from mtl_lora_cli.engine import aside
from mtl_lora_cli.kernels.fp8 import Form, Rounded, exactly
from mtl_lora_cli.kernels.place import Place

_MOST_OWN_ROWS = 128
Norm = tuple[Tensor, Tensor]  # r [N] and w [d] of h = w ⊙ (r x)


class Group:
    """Projections of one input, some or all of them adapted.

    Inputs and output gradients come with room behind their columns (`room`), where the adapter's
    own small factor goes, so that the large product takes both; see `adapters/frozen.py`.

    Args:
        layers: as they stand in the model: `MultiTaskLinear`, or a frozen linear layer.
        resident: whether the weights stay in memory; see `FrozenWeights.lay_together`.
        roomy: whether room may be asked for; too few outputs would not stand at aligned places with it.

    Attributes:
        all_tasks: z holds the own rows of all tasks, present or not.
        written: the factors stand in their margins, for one forward pass (`margins.py`).
    """

    def __init__(self, *layers: torch.nn.Module, resident: bool = True, roomy: bool = True) -> None:
        bases = [
            layer.base_layer if isinstance(layer, MultiTaskLinear) else layer for layer in layers
        ]
        self.frozen = FrozenWeights(bases)  # type: ignore[arg-type]
        self.adapted = [layer for layer in layers if isinstance(layer, MultiTaskLinear)]
        self.products: AdapterProducts | None = None
        self.all_tasks = False
        self.written = False
        wanted = Room()
        if self.adapted:
            self.products = AdapterProducts.together(
                [
                    layer.products(span)
                    for layer, span in zip(layers, self.frozen.spans, strict=True)
                    if isinstance(layer, MultiTaskLinear)
                ]
            )
            # Parts of each task's own stand beside the shared ones, those of all tasks where they
            # are few: then there is one size whatever tasks are present.
            own = self.products.spread_by == "own"
            most = max(layer.config.own_rows for layer in self.adapted)
            self.all_tasks = own and self.adapted[0].routing.tasks * most <= _MOST_OWN_ROWS
            if self.all_tasks or not own:
                widths, count = self.widths(), len(self.adapted)
                wanted = Room(columns=count * widths.up, rows=count * widths.down)
        self.frozen.lay_together(wanted if roomy else Room(), resident=resident)

    @property
    def room(self) -> Room:
        """Columns to leave free behind the group's input, and behind its output's gradient."""
        return self.frozen.room

    @property
    def form(self) -> Form:
        """What its products read of its input, and of its output's gradient."""
        if not self.frozen.rounds:
            return "exact"
        return "both" if self.adapted else "eight"

    @property
    def count(self) -> int:
        """Number of `tensors`."""
        return 1 + 2 * len(self.adapted) if self.adapted else 0

    @torch.no_grad()
    def widths(self) -> Widths:
        """Rows of A and columns of B of each projection, with parts of all tasks' own."""
        each = [layer.factors(None) for layer in self.adapted]
        downs, ups = ([one.shape for one in some] for some in zip(*each, strict=True))
        return Widths.of(downs, ups, self.frozen.step)

    def wanted(self, slots: Slots) -> Tensor | None:
        """The tasks whose own parts are read: [P], or None for all."""
        return None if self.all_tasks else slots.wanted

    def tensors(self, mixing: Tensor | None, slots: Slots) -> list[Tensor | None]:
        """What autograd must know of: M, the downs, the ups."""
        if self.products is None:
            return []
        each = [layer.factors(self.wanted(slots)) for layer in self.adapted]
        return [mixing, *(down for down, _ in each), *(up for _, up in each)]

    def margin_places(self) -> list[Place]:
        """Which parameters go where in the margins, where A and B are parameters and there are margins."""
        if self.products is None or self.frozen.margins() is None:
            return []
        each = [layer.factors(None) for layer in self.adapted]
        if not all(isinstance(one, torch.nn.Parameter) for factors in each for one in factors):
            return []  # made of several
        downs, ups = zip(*each, strict=True)
        return self.products.margin_places(self.frozen, downs, ups)

    def forward(
        self, wide: Tensor | Rounded, tensors: Sequence[Any], slots: Slots, training: bool
    ) -> tuple[Tensor, Tape | None]:
        """y from [x | room], and what the backward pass needs of the adapters."""
        written, self.written = self.written, False
        if self.products is None or slots.count == 0:
            return self._frozen_product(wide), None
        x = self.input(wide)
        mixing, rest = tensors[0], tensors[1:]
        count = len(self.adapted)
        factors = self.products.in_margins(self.frozen, mixing) if written else None
        if factors is None or factors.down.dtype != x.dtype:
            downs, ups = rest[:count], rest[count:]
            factors = self.products.factors(self.frozen, x.dtype, downs, ups, mixing)
        mask = self.products.mask(x) if training else None
        z = self.products.narrow(x, mask, factors)
        tape = Tape(factors, z, mask, tuple(like.shape for like in rest))
        return self._product(wide, tape, slots), tape

    def again(self, wide: Tensor | Rounded, tape: Tape | None, slots: Slots) -> Tensor:
        """y once more."""
        if tape is None:
            return self._frozen_product(wide)
        return self._product(wide, tape, slots)

    def input(self, wide: Tensor | Rounded) -> Tensor:
        """x of [x | room]."""
        return exactly(wide)[:, : self.frozen.shape[1]]

    def _frozen_product(self, wide: Tensor | Rounded) -> Tensor:
        x = wide if isinstance(wide, Rounded) else self.input(wide)
        return self.frozen.product(x, self.frozen.weights())

    def backward(
        self, wide: Tensor | Rounded, tape: Tape | None, slots: Slots, wanted: bool, *, roomy: bool
    ) -> tuple[Tensor | None, Gradients | None]:
        """dx where it is wanted, and the adapters' gradients, that of A unfinished.

        Args:
            wide: [dy | room], or dy alone where it is not `roomy`, or dy in 8-bit rows, in the group's form.
            tape, slots: of the forward pass.
            wanted: whether dx is.
            roomy: whether there is room behind dy.
        """
        weights = self.frozen.weights()
        given = wide if isinstance(wide, Rounded) else wide[:, : self.frozen.shape[0]]
        if self.products is None or tape is None:
            return self.frozen.input_gradient(given, weights) if wanted else None, None
        dy = exactly(given)
        inside = wanted and roomy and self.room.rows and tape.mask is None
        room = None
        if inside and isinstance(wide, Tensor):
            room = wide[:, self.frozen.shape[0] :]
        du, dz = self.products.through(dy, tape.z, tape.factors, slots, room)
        with aside.work((dy, du, tape)):
            u = self.products.spread(tape.z, tape.factors, slots)
            found = Gradients(
                dz, *self.products.own_gradients(dy, u, du, tape.z, tape.factors, slots)
            )
        if not wanted:
            return None, found
        if room is not None:
            return self.frozen.input_gradient(wide, weights, tape.factors.down), found
        dx = self.frozen.input_gradient(given, weights)
        self.products.add_input_gradient(dx, dz, tape.mask, tape.factors)
        return dx, found

    def finish(
        self, gradients: Gradients | None, tape: Tape | None, x: Tensor, norm: Norm | None = None
    ) -> list[Tensor | None]:
        """The gradients of `tensors`.

        Args:
            gradients: from `backward`.
            tape: of the forward pass.
            x: the group's input [N, in]; with `norm` what the norm before it was given.
            norm: that norm.
        """
        if self.products is None:
            return []
        if gradients is None or tape is None:
            return [None] * self.count
        with aside.work((gradients, tape, x, norm)):
            parameters = self._parameter_gradients(self.products, gradients, tape, x, norm)
        return [gradients.dmixing, *parameters]

    def _parameter_gradients(
        self, products: AdapterProducts, given: Gradients, tape: Tape, x: Tensor, norm: Norm | None
    ) -> list[Tensor]:
        if norm is None:
            ddown = products.down_gradient(given.dz, x, tape.mask)
        else:
            ddown = products.normed_down_gradient(given.dz, x, *norm, tape.mask)
        half = len(tape.shapes) // 2
        dtype = self.adapted[0].lora_A.dtype
        return products.parameter_gradients(
            tape.shapes[:half], tape.shapes[half:], dtype, ddown, given.dups
        )

    def _product(self, wide: Tensor | Rounded, tape: Tape, slots: Slots) -> Tensor:
        assert self.products is not None
        weights = self.frozen.weights()
        if self.room.columns and isinstance(wide, Tensor):
            self.products.spread(tape.z, tape.factors, slots, out=wide[:, self.frozen.shape[1] :])
            return self.frozen.product(wide, weights, tape.factors.up)
        y = self.frozen.product(wide, weights)
        self.products.add_up(y, self.products.spread(tape.z, tape.factors, slots), tape.factors)
        return y


@dataclass
class Tape:
    """What a group's forward pass leaves: factors in the activations' dtype, z, the mask, and the
    shapes of the downs and ups."""

    factors: Factors
    z: Tensor
    mask: Tensor | None
    shapes: tuple[torch.Size, ...]

    def tensors(self) -> list[Tensor | None]:
        return [*self.factors, self.z, self.mask]

    @staticmethod
    def of(tensors: Sequence[Tensor], shapes: tuple[torch.Size, ...]) -> Tape:
        down, up, mixing, z, mask = tensors
        return Tape(Factors(down, up, mixing), z, mask, shapes)


@dataclass
class Gradients:
    """What a group's backward pass has found before A's gradient is asked for."""

    dz: Tensor
    dmixing: Tensor | None
    dups: list[Tensor]
