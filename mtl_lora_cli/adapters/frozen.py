"""The frozen weights of projections that read one input, as one matrix.

    W = [W_1; …; W_J]  [Σ out_j, in]        y = x Wᵀ + b        dx = dy W

One product for q, k and v, or for gate and up, instead of two or three. Dense weights are laid side
by side once; quantised weights are expanded for each product (`expanded.py`), or once, where they are left
expanded. No gradient of W is ever computed.

Where there is *room*, the adapters' factors stand in margins of the same matrix, and their products
happen inside the large ones instead of in another pass over the outputs:

    y = [x | u] [W | s B]ᵀ        dx = [dy | dz] [W; A]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mtl_lora_cli.adapters.expanded import buffer, laid, pitched
from mtl_lora_cli.kernels import fp8, int8, nf4
from mtl_lora_cli.kernels.backend import in_triton

ALIGNMENT = 8  # values of 16 bit in the 16 bytes that a matrix product wants operands to start at


class Room(NamedTuple):
    """Margins of W: columns for s B, rows for A; none where the product cannot use them."""

    columns: int = 0
    rows: int = 0


def is_quantised(layer: nn.Linear) -> bool:
    """Whether the layer's weight is a quantised one of bitsandbytes, of 4 or 8 bits."""
    return _is_quantised(layer.weight)


def is_plain(layer: nn.Linear) -> bool:
    """Whether the layer's weight is a matrix of floats that does not learn."""
    return not (is_quantised(layer) or layer.weight.requires_grad)


def step_of(like: Tensor, dtype: torch.dtype) -> int:
    """What the sizes of an adapter's factors in a dtype are rounded up to: zeros fill them up.

    A product of other sizes takes kernels that read number by number; a CPU takes any.

    Args:
        like: a tensor where the factors will be.
        dtype: theirs.
    """
    half = dtype in (torch.bfloat16, torch.float16) or not like.is_cuda
    return ALIGNMENT if in_triton(like) and half else 1


def _is_quantised(weight: Tensor) -> bool:
    return getattr(weight, "quant_state", None) is not None or weight.dtype == torch.int8


class FrozenWeights:
    """See the module. The layers keep their parameters; nothing is registered here.

    Args:
        layers: the projections, all of one input size, in the order of their outputs.

    Attributes:
        exact: multiply as without `round_to_fp8`.
        gone: W is there in 8 bits alone.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)
        ends = torch.tensor([0, *(layer.out_features for layer in layers)]).cumsum(0).tolist()
        self.spans = tuple(pairwise(ends))
        self.shape = (ends[-1], layers[0].in_features)
        self._room = Room()
        self._together: Tensor | None = None
        self._rows: tuple[fp8.ScaledRows, fp8.ScaledRows] | None = None
        self._left: Tensor | None = None
        self._apart: tuple[Tensor, Tensor] | None = None  # s B and A, where W has fewer bits
        self.exact = False
        self.gone = False

    def weights(self) -> tuple[Tensor, ...]:
        """The layers' own parameters, as a backward pass should keep them."""
        return tuple(layer.weight for layer in self.layers)

    @property
    def room(self) -> Room:
        """The margins that `product` and `input_gradient` can use."""
        return Room() if self.rounds else self._room

    @property
    def rounds(self) -> bool:
        """Whether products are in 8-bit floats."""
        return self._rounded is not None

    @property
    def step(self) -> int:
        """See `step_of`."""
        return step_of(self.layers[0].weight, self.dtype)

    def lay_together(
        self,
        wanted: Room = Room(),  # noqa: B008 - a tuple never changes
        *,
        resident: bool = True,
    ) -> None:
        """Move dense weights into one piece of memory with margins, each a view of its part.

        Args:
            wanted: margins; granted in half precision on a card, and where they are aligned.
            resident: whether the weights stay where they are; otherwise they are copied side by
                side for each product, as 4-bit ones are expanded.
        """
        weight = self.layers[0].weight
        if self.step == ALIGNMENT and not any(side % ALIGNMENT for side in wanted):
            self._room = wanted
        if self.quantised and resident and self._room.columns:
            self._apart = self._by_themselves(self.dtype)
        if self.quantised or not resident or (len(self.layers) == 1 and self._room == Room()):
            return
        together = laid(weight.new_zeros(pitched(self.outer)), self.outer)
        with torch.no_grad():
            for layer, (start, stop) in zip(self.layers, self.spans, strict=True):
                place = together[start:stop, : self.shape[1]]
                place.copy_(layer.weight)
                layer.weight.data = place
        self._together = together

    @property
    def quantised(self) -> bool:
        """Whether a product has to make a dense matrix of values of 4 or 8 bits."""
        return any(map(is_quantised, self.layers))

    def leave_expanded(self) -> None:
        """Keep the dense matrix of quantised weights beside them: no product makes it again."""
        if self._left is None and self.quantised:
            device = self.layers[0].weight.device
            memory = torch.empty(pitched(self.outer), dtype=self.dtype, device=device)
            self._left = self._filled(laid(memory, self.outer), self.weights())

    def factor_space(
        self, columns: int, rows: int, dtype: torch.dtype, *, filled_up: bool
    ) -> tuple[Tensor, Tensor]:
        """Where s B [Σ out_j, columns] and A [rows, in] go: the margins, or new memory.

        What lies outside the blocks of s B is zero and stays so; of A, where it is `filled_up`, too.
        """
        (out, width), margins = self.shape, self.margins()
        wanted = columns, rows, dtype
        if (
            margins is not None
            and (margins[0].shape[1], len(margins[1]), margins[0].dtype) == wanted
        ):
            return margins
        where: dict[str, Any] = {"dtype": dtype, "device": self.layers[0].weight.device}
        below = torch.zeros if filled_up else torch.empty
        return torch.zeros(out, columns, **where), below(rows, width, **where)

    def margins(self) -> tuple[Tensor, Tensor] | None:
        """The places of s B [Σ out_j, columns] and A [rows, in] beside and below W, or, where it has fewer bits, by
        themselves; None: it has none."""
        out, width = self.shape
        if self.rounds or self._apart is not None:
            return self._apart
        if self._together is None or not self.room.columns:
            return None
        return self._together[:out, width:], self._together[out:, :width]

    def above_down(self) -> Tensor | None:
        """[W; A] [Σ out_j + rows, in], where A has its place in the margin; None: it has none."""
        if self._together is None or not self.room.rows:
            return None
        return self._together[:, : self.shape[1]]

    def in_memory(self) -> Tensor | None:
        """W [Σ out_j, in] as it lies there; None where each product makes it, or rounds it."""
        weight = self.layers[0].weight
        if self._rounded is not None or self.quantised:
            return None
        if self._together is not None:
            return self._together[: self.shape[0], : self.shape[1]]
        return weight if len(self.layers) == 1 else None

    def round_to_fp8(self) -> None:
        """From now on multiply in 8-bit floats (`kernels/fp8.py`), forward and backward.

        Two copies are kept, W scaled by rows and Wᵀ scaled by rows: each product wants the scale
        along its output.
        """
        dense = self._dense(self.weights(), self.dtype)
        self._rows = fp8.to_rows(dense), fp8.to_rows(dense.T.contiguous())
        if self._room.columns:
            self._apart = self._by_themselves(dense.dtype)

    def _by_themselves(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Memory for s B and A outside of W."""
        (out, width), (columns, rows) = self.shape, self._room
        where: dict[str, Any] = {"dtype": dtype, "device": self.layers[0].weight.device}
        return torch.zeros(out, columns, **where), torch.zeros(rows, width, **where)

    def let_go(self) -> None:
        """Free W in its own dtype: from now on it is there in 8 bits alone.

        The parameters keep their shape and dtype, but no number: whoever asks one gets NaN. Not for weights
        that are quantised or learn.
        """
        assert self._rows is not None, "W is not there in 8 bits"
        self.gone, self._together, self._room = True, None, Room()
        for layer in self.layers:
            layer.weight.data = layer.weight.new_full((), torch.nan).expand(layer.weight.shape)

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

    def product(
        self, x: Tensor | fp8.Rounded, weights: Sequence[Tensor], up: Tensor | None = None
    ) -> Tensor:
        """y = x Wᵀ + b.

        Args:
            x: [N, in], rounded already or not; with `up` [x | u] [N, in + columns].
            weights: from `weights`.
            up: s B [Σ out_j, columns], where there is room.

        Returns:
            [N, Σ out_j]
        """
        if self._rounded is not None:
            return fp8.product(fp8.rounded(x).rows, self._rounded[0], x.dtype, self.bias())
        x = fp8.exactly(x)
        if up is None:
            return F.linear(x, self._dense(weights, x.dtype), self.bias())
        wide = self._with_margins(weights, x.dtype, up=up)
        return F.linear(x, wide[: self.shape[0]], self.bias())

    def input_gradient(
        self,
        dy: Tensor | fp8.Rounded,
        weights: Sequence[Tensor],
        down: Tensor | None = None,
    ) -> Tensor:
        """dx = dy W.

        Args:
            dy: [N, Σ out_j], rounded already or not; with `down` [dy | dz] [N, Σ out_j + rows].
            weights: from `weights`.
            down: A [rows, in], where there is room.

        Returns:
            [N, in]
        """
        if self._rounded is not None:
            return fp8.product(fp8.rounded(dy).rows, self._rounded[1], dy.dtype)
        dy = fp8.exactly(dy)
        if down is None:
            return dy @ self._dense(weights, dy.dtype)
        return dy @ self._with_margins(weights, dy.dtype, down=down)[:, : self.shape[1]]

    @property
    def _rounded(self) -> tuple[fp8.ScaledRows, fp8.ScaledRows] | None:
        assert not (self.exact and self.gone), "the exact weights were let go of"
        return None if self.exact else self._rows

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, or what they were quantised from."""
        weight = self.layers[0].weight
        state = getattr(weight, "quant_state", None)
        if weight.dtype == torch.int8:  # it does not remember what it was made from
            return torch.bfloat16 if weight.is_cuda else torch.float32
        return weight.dtype if state is None else cast(torch.dtype, state.dtype)

    @property
    def outer(self) -> tuple[int, int]:
        """Rows and columns of W with its margins."""
        return self.shape[0] + self._room.rows, self.shape[1] + self._room.columns

    def _dense(self, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """W [Σ out_j, in]."""
        if len(weights) == 1 and not _is_quantised(weights[0]):
            return weights[0].to(dtype)
        rows, columns = self.shape
        if self._together is not None:
            return self._together[:rows, :columns].to(dtype)
        return self._matrix(weights, dtype)[:rows, :columns]

    def _with_margins(
        self,
        weights: Sequence[Tensor],
        dtype: torch.dtype,
        *,
        up: Tensor | None = None,
        down: Tensor | None = None,
    ) -> Tensor:
        """W with one of its margins filled: [Σ out_j + rows, in + columns]."""
        if self._together is not None:  # the factors stand there already
            return self._together
        rows, columns = self.shape
        out = self._matrix(weights, dtype)
        if up is not None:
            out[:rows, columns:].copy_(up)
        if down is not None:
            out[rows:, :columns].copy_(down)
        return out

    def _matrix(self, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """W in a matrix with margins, made now or left from before: the same bits in rows of the same pitch."""
        if self._left is not None and self._left.dtype == dtype:
            return self._left
        return self._filled(buffer(self.outer, weights[0].device, dtype), weights)

    def _filled(self, out: Tensor, weights: Sequence[Tensor]) -> Tensor:
        for weight, (start, stop) in zip(weights, self.spans, strict=True):
            part = out[start:stop, : self.shape[1]]
            state = getattr(weight, "quant_state", None)
            if state is not None:
                nf4.expand(weight, state, part)
            elif weight.dtype == torch.int8:
                int8.expand(weight, cast(Any, weight).SCB, part)
            else:
                part.copy_(weight)
        return out


class FrozenProduct(torch.autograd.Function):
    """y = x Wᵀ + b of one layer without an adapter; for the backward pass it keeps the Parameter.

    Args of `apply`: x [N, in], the layer's `FrozenWeights` and its weight. Returns [N, out].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: FrozenWeights, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.frozen = frozen
        return frozen.product(x, (weight,))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.frozen.input_gradient(dy, ctx.saved_tensors), None, None


def multiply_ourselves(model: nn.Module) -> None:
    """Give quantised layers without an adapter our product, wherever the model's own code calls them.

    bitsandbytes' own keep a view of their bytes for the backward pass, which therefore stay in memory
    where somebody takes the weights away between the passes; on a CPU they refuse some sizes; and 8-bit
    ones lose their scales at the first call.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and is_quantised(layer):
            layer.forward = partial(_product_of, FrozenWeights([layer]))  # type: ignore[method-assign]


def _product_of(frozen: FrozenWeights, x: Tensor) -> Tensor:
    y = FrozenProduct.apply(x.reshape(-1, x.shape[-1]), frozen, frozen.layers[0].weight)
    return cast(Tensor, y).view(*x.shape[:-1], frozen.shape[0])


def dense_stack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A stack of matrices [E, rows, columns] in a dtype; one in 4 bits expanded into the buffer of all."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.to(dtype)
    experts, rows, columns = state.shape
    out = buffer((experts * rows, columns), weight.device, dtype)
    return nf4.expand(weight, state, out).unflatten(0, (experts, rows))
