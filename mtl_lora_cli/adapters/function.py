"""One autograd function for frozen projections of one input and their adapters.

For a position of task t and projection j, with z = A x:

    y_j = W_j x + b_j + s · B_j M_{j,t} z_j       M_t = [g_{t,1} Λ_t; …; g_{t,n} Λ_t]  [n·r, r]

(arXiv 2410.09437, regrouped; see docs/method.md). With M the identity it is LoRA. The adapter's
product is accumulated into W x. The backward pass is given x, z, u = M z and the frozen Parameters
themselves, never a view or an expanded copy of them: 4-bit bytes can then be released between the
passes. It computes no gradient for frozen weights.

Projections may have adapters of different rank. In what is multiplied they all have as many rows of A and
columns of B as the largest, rounded up to a size that products like (`frozen.step_of`); zeros fill them up.
Parameters, M and the gradients have their own sizes.

`AdapterProducts` is the arithmetic, for others to build larger functions of; `AdaptedProjections`
is the function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_lora_cli.adapters.frozen import FrozenWeights
from mtl_lora_cli.adapters.methods.base import Spread
from mtl_lora_cli.adapters.routing import Slots
from mtl_lora_cli.adapters.token_gate import TokenGate
from mtl_lora_cli.kernels.backend import in_triton
from mtl_lora_cli.kernels.low_rank import add_product_
from mtl_lora_cli.kernels.mix import filled_up, mix, mix_gradient, of_tasks
from mtl_lora_cli.kernels.place import Place, place_each

NARROW = 128  # columns of u up to which launches count


class Factors(NamedTuple):
    """A group's adapters in the dtype of the activations.

    Attributes:
        down: A [J·k, in], the A_j below each other, each filled up with zeros.
        up: s B [Σ out_j, J·m], block-diagonal: s_j B_j, its up-projections side by side, in the rows of
            projection j and the columns of u_j; filled up likewise.
        mixing: M [J, P, m, k] of the largest adapter's own m and k, float32 or better, where the spread is by
            `task`; bool [J, P, k] where it is each task's `own`; otherwise None.
    """

    down: Tensor
    up: Tensor
    mixing: Tensor | None


class Widths(NamedTuple):
    """k and m of each projection of a group, filled up.

    Attributes:
        down: rows of A.
        up: columns of B.
    """

    down: int
    up: int

    @staticmethod
    def of(downs: Sequence[torch.Size], ups: Sequence[torch.Size], step: int) -> Widths:
        """The largest, rounded up to multiples of `step`.

        Args:
            downs: [nA, r, in] of each projection.
            ups: [n, out, r] of each.
            step: see `frozen.step_of`.
        """
        down = max(shape[0] * shape[1] for shape in downs)
        up = max(shape[0] * shape[2] for shape in ups)
        return Widths(-(-down // step) * step, -(-up // step) * step)


@dataclass(frozen=True)
class AdapterProducts:
    """The adapters' part of a group of projections.

    Attributes:
        spans: (start, stop) of each adapted projection in the group's output.
        scales: s of each.
        dropout: share of input features dropped before A while training.
        spread_by: how u follows from z: `same` u = z; `task` u = M_t z; `own` u = z in the rows of the
            task, 0 in the others; `token` u_i = softmax(z″ / τ)_i z′ with z = [z′; z″], z″ [n].
        ups, temperature: n and τ, read by `token`.
        ranks: of each projection the size of z′, read by `token`.
    """

    spans: tuple[tuple[int, int], ...]
    scales: tuple[float, ...]
    dropout: float = 0.0
    spread_by: Spread = "task"
    ups: int = 1
    temperature: float = 1.0
    ranks: tuple[int, ...] = ()

    @staticmethod
    def together(each: Sequence[AdapterProducts]) -> AdapterProducts:
        """Of several projections of one input: alike but for spans, scales and ranks, and `same` beside `own`."""
        own = any(one.spread_by == "own" for one in each)
        return replace(
            each[0],
            spans=tuple(span for one in each for span in one.spans),
            scales=tuple(scale for one in each for scale in one.scales),
            ranks=tuple(rank for one in each for rank in one.ranks),
            spread_by="own" if own else each[0].spread_by,
        )

    def factors(
        self,
        frozen: FrozenWeights,
        dtype: torch.dtype,
        downs: Sequence[Tensor],
        ups: Sequence[Tensor],
        mixing: Tensor | None,
    ) -> Factors:
        """From the parameters: downs [nA, r, in] and ups [n, out_j, r] of each projection.

        They may stand in the margins of the frozen weights, and then hold until the next call.
        """
        found = self._space(frozen, dtype, downs, ups)
        place_each(self._places(found, downs, ups))
        return Factors(*found, None if mixing is None else mixing.detach())

    def in_margins(self, frozen: FrozenWeights, mixing: Tensor | None) -> Factors | None:
        """The factors that stand in the margins already, or None where there are no margins."""
        margins = frozen.margins()
        if margins is None:
            return None
        return Factors(margins[1], margins[0], None if mixing is None else mixing.detach())

    def margin_places(
        self, frozen: FrozenWeights, downs: Sequence[Tensor], ups: Sequence[Tensor]
    ) -> list[Place]:
        """Which parameters go where in the margins; nothing where there are none."""
        found = self.in_margins(frozen, None)
        return [] if found is None else self._places((found.down, found.up), downs, ups)

    def _space(
        self,
        frozen: FrozenWeights,
        dtype: torch.dtype,
        downs: Sequence[Tensor],
        ups: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        own = [down.shape for down in downs]
        widths, count = Widths.of(own, [up.shape for up in ups], frozen.step), len(downs)
        filled_up = any(shape[0] * shape[1] != widths.down for shape in own)
        block, below = frozen.factor_space(
            count * widths.up, count * widths.down, dtype, filled_up=filled_up
        )
        return below, block

    def _places(
        self, found: tuple[Tensor, Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor]
    ) -> list[Place]:
        """Where A and s B of each projection stand in [A_1; …] and the block-diagonal s B."""
        below, block = found
        count = len(self.spans)
        lower = [
            Place(
                down.detach().view(1, -1, down.shape[2]),
                part[: down.shape[0] * down.shape[1]][None],
                1.0,
            )
            for part, down in zip(below.chunk(count), downs, strict=True)
        ]
        right = [
            Place(
                up.detach(),
                part[start:stop, : up.shape[0] * up.shape[2]]
                .unflatten(1, (up.shape[0], up.shape[2]))
                .permute(1, 0, 2),
                scale,
            )
            for (start, stop), part, up, scale in zip(
                self.spans, block.chunk(count, dim=1), ups, self.scales, strict=True
            )
        ]
        return lower + right

    def mask(self, x: Tensor) -> Tensor | None:
        """Which features dropout keeps, bool like x; None without dropout."""
        if not self.dropout:
            return None
        return torch.rand(x.shape, dtype=torch.float32, device=x.device) >= self.dropout

    def narrow(self, x: Tensor, mask: Tensor | None, factors: Factors) -> Tensor:
        """z = A (mask ⊙ x): x [N, in] → [N, J·k]."""
        return self.dropped(x, mask) @ factors.down.T

    def spread(
        self, z: Tensor, factors: Factors, slots: Slots, out: Tensor | None = None
    ) -> Tensor:
        """u from z: [N, J·k] → [N, J·m], written to `out` if given; 0 without a task."""
        if self.spread_by == "task":
            assert factors.mixing is not None
            width = factors.up.shape[-1] // len(self.spans)
            return mix(z, factors.mixing, slots.index, width=width, out=out)
        if self.spread_by == "own":
            u = torch.where(self._own(z, factors, slots), z, 0.0)
            return u if out is None else out.copy_(u)
        u = z
        if self.spread_by == "token":
            width = factors.up.shape[-1] // len(self.spans)
            u = self._gate.spread(z, width).to(z.dtype)
        return of_tasks(u, slots.index, slots.active, out)

    def unspread(
        self, du: Tensor, z: Tensor, factors: Factors, slots: Slots, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """dz [N, J·k], written to `out` if given, and dM (or None) from du [N, J·m]."""
        dz = self._through_mixing(du, z, factors, slots, out)
        return dz, self._mixing_gradient(du, z, factors, slots)

    def _through_mixing(
        self, du: Tensor, z: Tensor, factors: Factors, slots: Slots, out: Tensor | None
    ) -> Tensor:
        if self.spread_by == "task":
            assert factors.mixing is not None
            width = z.shape[1] // len(self.spans)
            return mix(du, factors.mixing, slots.index, transposed=True, width=width, out=out)
        if self.spread_by == "own":
            dz = torch.where(self._own(z, factors, slots), du, 0.0)
            return dz if out is None else out.copy_(dz)
        if self.spread_by == "same":
            return of_tasks(du, slots.index, slots.active, out)
        if slots.active is not None:
            du = torch.where(slots.active, du, 0.0)
        dz = self._gate.gradient(du, z)
        return dz if out is None else out.copy_(dz)

    def _mixing_gradient(
        self, du: Tensor, z: Tensor, factors: Factors, slots: Slots
    ) -> Tensor | None:
        if self.spread_by != "task":
            return None
        assert factors.mixing is not None
        return mix_gradient(du, z, slots.index, factors.mixing.shape, slots.runs)

    @property
    def _gate(self) -> TokenGate:
        return TokenGate(self.ranks, self.ups, self.temperature)

    def _own(self, z: Tensor, factors: Factors, slots: Slots) -> Tensor:
        """Which of z's columns are a position's: bool [N, J·k]."""
        assert factors.mixing is not None
        each = filled_up(factors.mixing, z.shape[1] // len(self.spans))
        rows = each.transpose(0, 1).flatten(1)  # [P, J·k]
        nobody = rows.new_zeros(1, rows.shape[1])
        return torch.cat([rows, nobody])[slots.index.long()]  # −1 is the last row

    def add_up(self, y: Tensor, u: Tensor, factors: Factors) -> None:
        """y_j += s B_j u_j in place."""
        for (start, stop), up, own in self._parts(factors.up, u):
            add_product_(y[:, start:stop], own, up)

    def gradients(
        self,
        dy: Tensor,
        z: Tensor,
        u: Tensor,
        factors: Factors,
        slots: Slots,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """From dy [N, Σ out_j]: dz [N, J·k], written to `out` if given, dM (or None), and dy_jᵀ u_j
        [out_j, m] of each B_j."""
        du, dz = self.through(dy, z, factors, slots, out)
        return dz, *self.own_gradients(dy, u, du, z, factors, slots)

    def through(
        self, dy: Tensor, z: Tensor, factors: Factors, slots: Slots, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What comes through the adapters: du [N, J·m], and dz [N, J·k], which is written to `out` if given."""
        du = self._through_up(dy, factors)
        return du, self._through_mixing(du, z, factors, slots, out)

    def own_gradients(
        self, dy: Tensor, u: Tensor, du: Tensor, z: Tensor, factors: Factors, slots: Slots
    ) -> tuple[Tensor | None, list[Tensor]]:
        """What stays there: dM (or None), and dy_jᵀ u_j [out_j, m] of each B_j."""
        return self._mixing_gradient(du, z, factors, slots), self._up_gradients(dy, u)

    def _up_gradients(self, dy: Tensor, u: Tensor) -> list[Tensor]:
        count = len(self.spans)
        if _launches_count(dy, u):  # the other blocks are not read
            every = wide_product(dy.T, u).chunk(count, dim=1)
            return [part[start:stop] for (start, stop), part in zip(self.spans, every, strict=True)]
        each = zip(self.spans, u.chunk(count, dim=1), strict=True)
        return [wide_product(dy[:, start:stop].T, own) for (start, stop), own in each]

    def _through_up(self, dy: Tensor, factors: Factors) -> Tensor:
        """du [N, J·m], of each projection dy_j s B_j."""
        count, up = len(self.spans), factors.up
        if count > 1 and _launches_count(dy, up):
            return dy @ up  # outside of its blocks there are zeros
        each = zip(self.spans, up.chunk(count, dim=1), strict=True)
        products = [(dy[:, start:stop], block[start:stop]) for (start, stop), block in each]
        if count == 1 or not in_triton(dy):
            dus = [part @ own for part, own in products]
            return dus[0] if count == 1 else torch.cat(dus, dim=1)
        du = torch.empty(len(dy), up.shape[1], dtype=dy.dtype, device=dy.device)
        for (part, own), place in zip(products, du.chunk(count, dim=1), strict=True):
            torch.mm(part, own, out=place)  # where it belongs: a copy would be one more launch
        return du

    def add_input_gradient(
        self, dx: Tensor, dz: Tensor, mask: Tensor | None, factors: Factors
    ) -> None:
        """dx += mask ⊙ (dz A) in place."""
        if mask is None:
            add_product_(dx, dz, factors.down.T)
        else:
            dx.add_(self.dropped(dz @ factors.down, mask))

    def down_gradient(self, dz: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """dA = dzᵀ (mask ⊙ x), [J·k, in], float32 or better."""
        return wide_product(dz.T, self.dropped(x, mask))

    def normed_down_gradient(
        self, dz: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, mask: Tensor | None
    ) -> Tensor:
        """dA where the group's input is h = w ⊙ (r x), without h: ((r dz)ᵀ (mask ⊙ x)) ⊙ w.

        Args:
            dz: [N, J·k].
            x: [N, in], what was normed.
            inverse: r [N].
            weight: w [in].
            mask: of dropout, or None.
        """
        scaled = torch.mul(dz, inverse[:, None], out=torch.empty_like(dz))
        return wide_product(scaled.T, self.dropped(x, mask)).mul_(weight)

    def parameter_gradients(
        self,
        downs: Sequence[torch.Size],
        ups: Sequence[torch.Size],
        dtype: torch.dtype,
        ddown: Tensor,
        dups: Sequence[Tensor],
    ) -> list[Tensor]:
        """dA and the dy_jᵀ u_j in the shapes of the downs and ups, and in their dtype."""
        found = [
            part[: shape[0] * shape[1]].view(shape).to(dtype)
            for part, shape in zip(ddown.chunk(len(downs)), downs, strict=True)
        ]
        for part, shape, scale in zip(dups, ups, self.scales, strict=True):
            n, _, rank = shape
            gradient = torch.empty(shape, dtype=dtype, device=part.device)
            own = part[:, : n * rank].unflatten(1, (n, rank))
            torch.mul(own.permute(1, 0, 2), scale, out=gradient)
            found.append(gradient)
        return found

    def _parts(self, up: Tensor, u: Tensor) -> list[tuple[tuple[int, int], Tensor, Tensor]]:
        """(span, s B_j, u_j) of each projection."""
        count = len(self.spans)
        return [
            (span, block[span[0] : span[1]], own)
            for span, block, own in zip(
                self.spans, up.chunk(count, dim=1), u.chunk(count, dim=1), strict=True
            )
        ]

    def dropped(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x without the features that dropout takes, the others scaled up."""
        return x if mask is None else (x * mask).div_(1 - self.dropout)


class AdaptedProjections(torch.autograd.Function):
    """y = W x + b + s · B M_{task} A (mask ⊙ x), for flattened positions.

    Args of `apply`: x [N, in]; frozen, products, slots and mask [N, in] (bool or None); mixing
    [J, P, m, k] or None; then the frozen weights, the J downs and the J ups. Returns [N, Σ out_j].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: FrozenWeights,
        products: AdapterProducts,
        slots: Slots,
        mask: Tensor | None,
        mixing: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        weights, downs, ups = _split(tensors, len(frozen.layers), len(products.spans))
        factors = products.factors(frozen, x.dtype, downs, ups, mixing)
        y = frozen.product(x, weights)
        z = products.narrow(x, mask, factors)
        u = products.spread(z, factors, slots)
        products.add_up(y, u, factors)
        ctx.save_for_backward(x, z, u, mask, *factors, *tensors)
        ctx.static = (frozen, products, slots)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        frozen, products, slots = ctx.static
        x, z, u, mask, down, up, mixing, *tensors = ctx.saved_tensors
        factors = Factors(down, up, mixing)
        weights, downs, ups = _split(tensors, len(frozen.layers), len(products.spans))
        dz, dmixing, dups = products.gradients(dy, z, u, factors, slots)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = frozen.input_gradient(dy, weights)
            products.add_input_gradient(dx, dz, mask, factors)
        ddown = products.down_gradient(dz, x, mask)
        if dmixing is not None:
            dmixing = dmixing.to(mixing.dtype)
        shapes = [[like.shape for like in some] for some in (downs, ups)]
        parameters = products.parameter_gradients(*shapes, downs[0].dtype, ddown, dups)
        return dx, None, None, None, None, dmixing, *(None,) * len(weights), *parameters


def _split(
    tensors: Sequence[Tensor], weights: int, adapters: int
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    middle = weights + adapters
    return tensors[:weights], tensors[weights:middle], tensors[middle:]


def _launches_count(dy: Tensor, narrow: Tensor) -> bool:
    """Whether the products of several projections are one: a launch takes longer than what that adds."""
    return dy.is_cuda and narrow.shape[1] <= NARROW


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 at least, of matrices or of stacks of them: the sums run over all positions."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        product = torch.mm if a.dim() == 2 else torch.bmm
        return product(a, b, out_dtype=torch.float32)
    return (a @ b).to(torch.float64 if a.dtype == torch.float64 else torch.float32)
