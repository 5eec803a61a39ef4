"""Causal attention over packed rows on a card: how the kernels of `triton_attention_kernels.py` are launched."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from mtl_lora_cli.kernels.tiles import (
    COLUMNS,
    FORWARD,
    KEY_BACKWARD,
    QUERY_BACKWARD,
    Launch,
    check_dim,
    launch_for,
)
from mtl_lora_cli.kernels.trees import JOIN_COLUMNS, PART_COLUMNS, KeyParts, Trees
from mtl_lora_cli.kernels.triton_attention_kernels import (
    attention_backward_keys_kernel,
    attention_backward_queries_kernel,
    attention_forward_kernel,
)
from mtl_lora_cli.kernels.triton_tree_attention import (
    tree_backward_keys_kernel,
    tree_join_keys_kernel,
)

LOG2_E = 1.4426950408889634
Angles = tuple[Tensor, Tensor]
_NONE = (None, None, None)  # of reach, above and depth


def attention_forward(
    qkv: Tensor,
    tiles: Tensor,
    *,
    heads: int,
    key_heads: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    trees: Trees | None = None,
    out: Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """O = softmax(scaling · Q Kᵀ) V inside each segment, causal (FlashAttention-2, algorithm 1).

    Args:
        qkv: [N, (H + 2G)·D], bfloat16, float16 or float32: H query heads and G key heads, both rotated,
            and G value heads; rows may lie further apart than they are wide.
        tiles: int32 [T, 3] of `tile_table` for blocks of `launch.tile`, on qkv's device.
        window: w, keys that a query sees, its own among them; None: all before it.
        softcap: c; None: scores have none.
        sinks: σ [H], a logit a head; None: there are none.
        trees: where segments are trees; the first key of a segment reaches its end.
        out: [N, H·D] to write to, in qkv's dtype.
        launch: another shape of programs than `FORWARD` gives for D.

    Returns:
        out [N, H·D] in qkv's dtype, and lse float32 [H, N], natural logarithms, the sinks among them.

    Raises:
        ValueError: sizes, types or strides that do not fit each other.
    """
    dim = _check(qkv, tiles, heads, key_heads, scaling)
    launch = launch or launch_for(FORWARD, dim)
    count = qkv.shape[0]
    if out is None:
        out = torch.empty(count, heads * dim, dtype=qkv.dtype, device=qkv.device)
    _check_rows("out", out, qkv, heads * dim)
    _check_window(window)
    _check_trees(count, trees)
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(
            f"sinks must be a logit for each of {heads} heads, not {list(sinks.shape)}"
        )
    lse = torch.empty(heads, count, dtype=torch.float32, device=qkv.device)
    attention_forward_kernel[(len(tiles) * heads,)](
        qkv, qkv.stride(0), tiles, *(trees or _NONE), sinks, out, out.stride(0), lse, count,
        *_factors(scaling, softcap), TREES=trees is not None, WINDOW=window or 0,
        CAP=softcap is not None, SINKS=sinks is not None, **_shape(heads, key_heads, dim, launch),
    )  # fmt: skip
    return out, lse


def attention_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor | KeyParts,
    *,
    heads: int,
    key_heads: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    trees: Trees | None = None,
    turn: Angles | None = None,
    dqkv: Tensor | None = None,
    query_launch: Launch | None = None,
    key_launch: Launch | None = None,
) -> Tensor:
    """The gradient of `attention_forward` (FlashAttention-2, algorithm 2), in two kernels.

    The first gives dQ and δ, a program a tile of queries and a query head; the second dK and dV, a
    program a tile of keys and a key head, which adds up its group's query heads. In trees a tile of keys may
    be several programs', and one kernel more adds up what they found.
    Where D is no power of two from 16, `turn` takes a third, which turns every row of dqkv.

    Args:
        dout: [N, H·D] in qkv's dtype; rows may lie apart.
        qkv, scaling, window, softcap, trees: as in the forward pass.
        out, lse: what it returned; sinks are in lse.
        query_tiles: int32 [T, 3] of `tile_table` for blocks of `query_launch.tile`.
        key_tiles: the same for `key_launch.tile`, best with `of_keys=True`; of trees their parts for it.
        turn: cos and sin, float32 [N, D / 2], by which q and k were rotated: dqkv is the gradient of
            what they were before, [d₁, d₂] turned back to [d₁ cos + d₂ sin, d₂ cos − d₁ sin]. The
            rows of both may lie apart, in the same way.
        dqkv: as qkv, to write to; its rows may lie apart in another way.
        query_launch, key_launch: other shapes than `QUERY_BACKWARD` and `KEY_BACKWARD` give for D.

    Returns:
        dqkv [N, (H + 2G)·D] in qkv's dtype.

    Raises:
        ValueError: sizes, types or strides that do not fit each other.
    """
    dim = _check(qkv, query_tiles, heads, key_heads, scaling)
    if isinstance(key_tiles, KeyParts) != (trees is not None):
        raise ValueError("trees need parts of keys, and nothing else has them")
    if isinstance(key_tiles, Tensor):
        _check_tiles(key_tiles)
    _check_window(window)
    _check_trees(qkv.shape[0], trees)
    query_launch = query_launch or launch_for(QUERY_BACKWARD, dim)
    key_launch = key_launch or launch_for(KEY_BACKWARD, dim)
    count, width = qkv.shape
    if dqkv is None:
        dqkv = torch.empty(count, width, dtype=qkv.dtype, device=qkv.device)
    _check_rows("dqkv", dqkv, qkv, width)
    _check_rows("dout", dout, qkv, heads * dim)
    _check_rows("out", out, qkv, heads * dim)
    if lse.shape != (heads, count) or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ValueError(f"lse must be the forward pass's, received {lse.dtype} {list(lse.shape)}")
    cos, sin, angle_stride = None, None, 0
    if turn is not None:
        cos, sin = turn
        _check_angles(cos, sin, count, dim)
        angle_stride = cos.stride(0)
    # Where D is padded, its halves do not meet in the middle of a program's columns.
    inside = turn is not None and dim == _width(dim)
    terms = torch.empty(heads, count, 2, dtype=torch.float32, device=qkv.device)
    sources = (dout, dout.stride(0), qkv, qkv.stride(0), cos, sin, angle_stride)
    results = (terms, dqkv, dqkv.stride(0), count, *_factors(scaling, softcap), scaling)
    kind = {"TURN": inside, "WINDOW": window or 0, "CAP": softcap is not None}
    attention_backward_queries_kernel[(len(query_tiles) * heads,)](
        *sources, query_tiles, *(trees or _NONE), out, out.stride(0), lse, *results,
        TREES=trees is not None, **kind, **_shape(heads, key_heads, dim, query_launch),
    )  # fmt: skip
    shape = _shape(heads, key_heads, dim, key_launch)
    if isinstance(key_tiles, Tensor):
        attention_backward_keys_kernel[(len(key_tiles) * key_heads,)](
            *sources, key_tiles, *results, **kind, **shape
        )
    else:
        assert trees is not None
        _tree_keys(sources, key_tiles, trees, results, kind, shape)
    if cos is not None and sin is not None and not inside:
        from mtl_lora_cli.kernels.rotary import Turn, rotate_

        rotate_(dqkv, Turn(cos, sin), heads=heads, key_heads=key_heads, back=True)
    return dqkv


def _tree_keys(
    sources: tuple[Any, ...],
    keys: KeyParts,
    trees: Trees,
    results: tuple[Any, ...],
    kind: dict[str, Any],
    shape: dict[str, Any],
) -> None:
    """dK and dV where queries stand in trees; the arguments are those of the kernels."""
    dout, _, _, _, cos, sin, angle_stride = sources
    terms, dqkv, dqkv_stride, *_, scaling = results
    groups, turn = shape["KEY_HEADS"], kind["TURN"]
    size = (keys.slots, groups, 2, shape["TILE"], shape["WIDTH"])
    sums = torch.empty(size, dtype=torch.float32, device=dout.device)
    own = {name: value for name, value in shape.items() if name not in ("COLUMNS", "SPLIT")}
    tree_backward_keys_kernel[(len(keys.parts) * groups,)](
        *sources, keys.parts, trees.reach, trees.depth, terms, dqkv, dqkv_stride, sums,
        *results[3:], COLUMNS=PART_COLUMNS, **kind, **own,
    )  # fmt: skip
    if len(keys.joins):
        joined = {name: own[name] for name in ("HEADS", "KEY_HEADS", "TILE", "DIM", "WIDTH")}
        tree_join_keys_kernel[(len(keys.joins) * groups,)](
            sums, keys.joins, cos, sin, angle_stride, dqkv, dqkv_stride, scaling,
            COLUMNS=JOIN_COLUMNS, TURN=turn, **joined,
        )  # fmt: skip


def _factors(scaling: float, softcap: float | None) -> tuple[float, float]:
    """By what scores, or their tanh, become powers of two; and what stands in the tanh (`_tanh`).

    Raises:
        ValueError: a cap that is not positive.
    """
    if softcap is None:
        return scaling * LOG2_E, 0.0
    if softcap <= 0:
        raise ValueError(f"a soft cap must be positive, received {softcap}")
    return softcap * LOG2_E, 2 * LOG2_E * scaling / softcap


def _width(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _shape(heads: int, key_heads: int, dim: int, launch: Launch) -> dict[str, int | bool]:
    return {
        "HEADS": heads,
        "KEY_HEADS": key_heads,
        "COLUMNS": COLUMNS,
        "TILE": launch.tile,
        "STEP": launch.step,
        "DIM": dim,
        "WIDTH": _width(dim),
        "SPLIT": launch.split,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }


def _check(qkv: Tensor, tiles: Tensor, heads: int, key_heads: int, scaling: float) -> int:
    """The head dimension; raises for whatever the kernels would read wrongly."""
    if qkv.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"qkv must be bfloat16, float16 or float32, received {qkv.dtype}")
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"{heads} query heads do not share {key_heads} key heads evenly")
    if scaling <= 0:  # the running maximum is taken before the scale
        raise ValueError(f"scaling must be positive, received {scaling}")
    dim, rest = divmod(qkv.shape[-1], heads + 2 * key_heads)
    if rest:
        raise ValueError(
            f"rows of {qkv.shape[-1]} do not hold {heads} + 2 · {key_heads} heads of one dimension"
        )
    check_dim(dim)
    _check_rows("qkv", qkv, qkv, qkv.shape[-1])
    _check_tiles(tiles)
    return dim


def _check_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"a query sees itself at least, received a window of {window}")


def _check_trees(count: int, trees: Trees | None) -> None:
    if trees is None:
        return
    for name, tensor in trees._asdict().items():
        if tensor.shape != (count,) or tensor.dtype != torch.int32:
            raise ValueError(
                f"{name} must be int32 {[count]}, received {tensor.dtype} {list(tensor.shape)}"
            )


def _check_angles(cos: Tensor, sin: Tensor, count: int, dim: int) -> None:
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.shape != (count, dim // 2) or angles.dtype != torch.float32:
            raise ValueError(
                f"{name} must be float32 {[count, dim // 2]}, "
                f"received {angles.dtype} {list(angles.shape)}"
            )
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        raise ValueError("cos and sin must have equal strides and a contiguous last axis")


def _check_rows(name: str, tensor: Tensor, qkv: Tensor, width: int) -> None:
    expected = (qkv.shape[0], width)
    if tensor.shape != expected or tensor.dtype != qkv.dtype:
        raise ValueError(
            f"{name} must be {qkv.dtype} {list(expected)}, "
            f"received {tensor.dtype} {list(tensor.shape)}"
        )
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have a contiguous last axis, its strides: {tensor.stride()}")


def _check_tiles(tiles: Tensor) -> None:
    if tiles.dtype != torch.int32 or tiles.shape[1:] != (COLUMNS,) or not tiles.is_contiguous():
        raise ValueError(
            f"tiles must be a table of tile_table, received {tiles.dtype} {list(tiles.shape)}"
        )
