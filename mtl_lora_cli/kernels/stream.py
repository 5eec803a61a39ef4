"""Where a block meets the residual stream: what the block before gives is normed, scaled and added, and
the sum is normed.

    δ = m · o,  or m · w₂ ⊙ (r₂ o)        x' = x + δ        h = x',  or w ⊙ (r x')

with r of `norm.py`. Gemma 2 and 3 have both norms, OLMo 2 the first alone, LLaMA the second.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton, with_room
from mtl_lora_cli.kernels.norm import add_norm, norm_gradient


class Norm(NamedTuple):
    """A norm over a whole row.

    Attributes:
        weight: w, or 1 + w [d].
        eps: ε.
    """

    weight: Tensor
    eps: float


class After(NamedTuple):
    """What becomes of a block's output before it is added.

    Attributes:
        norm: w₂ and its ε, or None.
        multiplier: m.
    """

    norm: Norm | None = None
    multiplier: float = 1.0

    @property
    def nothing(self) -> bool:
        """δ = o."""
        return self.norm is None and self.multiplier == 1.0


class Entry(NamedTuple):
    """What a backward pass wants to know of where a block met the stream.

    Attributes:
        total: x' [N, d].
        inverse: r [N], where there is a norm of x'.
        out, out_inverse: o [N, d] and r₂ [N], where there is one of o.
    """

    total: Tensor
    inverse: Tensor | None = None
    out: Tensor | None = None
    out_inverse: Tensor | None = None


def enter(
    x: Tensor, out: Tensor | None, after: After, norm: Norm | None, *, room: int = 0
) -> tuple[Entry, Tensor]:
    """x', and what the block is given.

    Args:
        x: [N, d], the stream.
        out: o [N, d], or None for nothing.
        after: what becomes of it.
        norm: of x', or None.
        room: columns to leave free behind those of h.

    Returns:
        what `enter_gradient` needs, and h [N, d + room].
    """
    if out is not None and not after.nothing and in_triton(x):
        from mtl_lora_cli.kernels import triton_stream

        entry, made = triton_stream.enter(x, out, after, norm, room)
        return entry, made.whole()
    added, out_inverse = out, None
    if out is not None and after.norm is not None:
        _, added, out_inverse = add_norm(out, None, *after.norm)
    if added is not None and after.multiplier != 1.0:
        added = added * after.multiplier
    kept = None if out_inverse is None else out
    if norm is None:
        total = x if added is None else x + added
        return Entry(total, None, kept, out_inverse), with_room(total, room)
    total, h, inverse = add_norm(x, added, *norm, room=room)
    return Entry(total, inverse, kept, out_inverse), h


def enter_gradient(
    dh: Tensor,
    dresidual: Tensor | None,
    entry: Entry,
    after: After,
    norm: Norm | None,
    *,
    room: int = 0,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and o: of x' is r (w dh − x̂ mean(w dh x̂)) + dresidual, and so on for o.

    Args:
        dh: [N, d].
        dresidual: of x', from what goes on with it beside the block, [N, d]; rows may lie apart.
        entry, after, norm: as in `enter`.
        room: columns to leave free behind those of the gradient of o.

    Returns:
        [N, d] and [N, d + room]; the first may be a view of the second.
    """
    total, inverse, out, out_inverse = entry
    if not after.nothing and in_triton(total):
        from mtl_lora_cli.kernels import triton_stream

        dx, own = triton_stream.enter_gradient(dh, dresidual, entry, after, norm, room)
        return dx, own.whole()
    own_room = room if after.nothing else 0
    if norm is None or inverse is None:
        dx = with_room(dh if dresidual is None else dh + dresidual, own_room)
    else:
        dx = norm_gradient(dh, dresidual, total, inverse, norm.weight, room=own_room)
    if after.nothing:
        return dx[:, : total.shape[1]], dx
    dout = dx if after.multiplier == 1.0 else dx * after.multiplier
    if after.norm is not None and out is not None and out_inverse is not None:
        dout = norm_gradient(dout.contiguous(), None, out, out_inverse, after.norm.weight)
    return dx, with_room(dout, room)
