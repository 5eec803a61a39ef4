"""What a layer does where each row adds one token: tasks' own products, keys put by, attention to what is kept.

A product with [W; A] gives y = W h and z = A h of N rows at once. What a row's task makes of z,

    y_i += U_{slot(i)} z_i        U_t = s B M_t        nothing where slot(i) is −1,

is added by whoever reads y next: U of all tasks is made once, before the first step. Nothing here has a
backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton
from mtl_lora_cli.kernels.gated import Activation, gated
from mtl_lora_cli.kernels.head_norm import HeadNorms, head_norm
from mtl_lora_cli.kernels.norm import add_norm
from mtl_lora_cli.kernels.rotary import Turn, rotate_

MOST_ROWS = 1  # that our own product is for; more go to torch's


class Ups(NamedTuple):
    """U of the adapted projections in a group's output.

    Attributes:
        matrix: [P, k, out], Uᵀ of each task; zero in the columns of projections without an adapter.
        spans: (start, stop) of each adapted projection in the output; the j-th reads z's columns j·k to
            (j + 1)·k.
        starts: int32 [out], the first of these columns for each output.
    """

    matrix: Tensor
    spans: tuple[tuple[int, int], ...]
    starts: Tensor


class Added(NamedTuple):
    """y [N, out] of a group, and what has yet to be added to it: see the module.

    Attributes:
        y: rows may lie apart.
        z: [N, J·k], or None where nothing is to be added.
        ups: of the group.
        slot: int32 [N].
    """

    y: Tensor
    z: Tensor | None = None
    ups: Ups | None = None
    slot: Tensor | None = None


def product(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """h Wᵀ + b: [N, in] → [N, out]; W's rows may lie apart."""
    # Measured on one H200: torch's is faster for many outputs of short rows, as small models' heads have.
    if in_triton(h) and len(h) <= MOST_ROWS and (h.shape[1] >= 1024 or len(weight) <= 2**15):
        from mtl_lora_cli.kernels import triton_one_token

        return triton_one_token.row_product(h, weight, bias)
    return F.linear(h, weight, bias)


def whole(added: Added) -> Tensor:
    """y with all that was to be added, contiguous; it may be written in place."""
    y, z, ups, slot = added
    if z is None or ups is None or slot is None:
        return y.contiguous()
    if in_triton(y):
        from mtl_lora_cli.kernels import triton_one_token

        return triton_one_token.whole(y, z, ups, slot)
    y = y.contiguous()
    width, active = ups.matrix.shape[1], (slot >= 0)[:, None]
    own = ups.matrix[slot.clamp(min=0).long()] if len(ups.matrix) > 1 else None
    for number, (start, stop) in enumerate(ups.spans):
        low = torch.where(active, z[:, number * width : (number + 1) * width], 0.0)
        if own is None:
            y[:, start:stop].addmm_(low, ups.matrix[0, :, start:stop])
        else:
            y[:, start:stop] += torch.bmm(low[:, None], own[:, :, start:stop])[:, 0]
    return y


def normed(x: Tensor, added: Added | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x' = x + y and its norm, both [N, d]; see `norm.py`."""
    if added is not None and in_triton(x):
        from mtl_lora_cli.kernels import triton_one_token

        return triton_one_token.normed(x, added, weight, eps)
    total, h, _ = add_norm(x, None if added is None else whole(added), weight, eps)
    return total, h


def activated(added: Added, activation: Activation) -> Tensor:
    """f(g) ⊙ u [N, f] of y = [g | u]; see `gated.py`."""
    if in_triton(added.y) and activation in ("silu", "gelu_tanh"):
        from mtl_lora_cli.kernels import triton_one_token

        return triton_one_token.activated(added, activation)
    return gated(whole(added), activation)


def put_by(
    added: Added,
    norms: HeadNorms | None,
    turned: Turn | None,
    places: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    heads: int,
) -> Tensor:
    """Queries, normed and turned; keys and values go to their places.

    Args:
        added: y = [q | k | v], N rows.
        norms: of queries and keys.
        turned: of each of the L places; None: nothing turns.
        places: int32 [N], the place of each row's token.
        keys, values: [≥ N, G, L, D]; row i's token is written at (i, :, places[i]).
        heads: H.

    Returns:
        q [N, H·D].
    """
    key_heads, dim = keys.shape[1], keys.shape[3]
    if norms is not None:
        added = Added(head_norm(whole(added), norms, heads=heads, key_heads=key_heads))
    if in_triton(added.y):
        from mtl_lora_cli.kernels import triton_one_token

        return triton_one_token.put_by(added, turned, places, keys, values, heads=heads)
    qkv, at = whole(added), places.long()
    if turned is not None:
        turn = Turn(turned.cos[at], turned.sin[at], turned.pairs)
        rotate_(qkv, turn, heads=heads, key_heads=key_heads)
    q, k, v = qkv.split([heads * dim, key_heads * dim, key_heads * dim], dim=1)
    rows = torch.arange(len(qkv), device=qkv.device)
    keys[rows, :, at] = k.view(-1, key_heads, dim)
    values[rows, :, at] = v.view(-1, key_heads, dim)
    return q


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Tensor,
    *,
    longest: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Σ_j softmax_j(s_ij) v_j over what a row keeps, its own token included.

    s_ij = scaling · q_i·k_j, or c tanh of it by c; j ≤ places[i], and i − j < window.

    Args:
        q: [N, H·D].
        keys, values: [≥ N, G, L, D].
        places: int32 [N], the place of each row's token.
        longest: no place is beyond it; the kernels do not ask, for a graph serves any.
        scaling, window, softcap: see above.

    Returns:
        [N, H·D].
    """
    if in_triton(q):
        from mtl_lora_cli.kernels import triton_one_token

        return triton_one_token.attend(
            q, keys, values, places, scaling=scaling, window=window, softcap=softcap
        )
    rows, dim = len(q), keys.shape[3]
    k, v = keys[:rows, :, : longest + 1], values[:rows, :, : longest + 1]
    at = torch.arange(longest + 1, device=q.device)
    seen = at <= places[:, None]
    if window is not None:
        seen &= places[:, None] - at < window
    mask = seen[:, None, None]
    each = q.view(rows, -1, 1, dim)
    if softcap is None:
        out = F.scaled_dot_product_attention(
            each, k, v, attn_mask=mask, scale=scaling, enable_gqa=True
        )
    else:
        grouped = each.view(rows, k.shape[1], -1, dim)
        scores = torch.tanh(grouped @ k.transpose(2, 3) * (scaling / softcap)) * softcap
        out = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v
    return out.reshape(rows, -1)
