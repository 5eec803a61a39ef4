"""Attention kernels against ten naive lines in float64, one segment at a time."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mtl_lora_cli.engine.kernel_attention import kernels_take
from mtl_lora_cli.engine.segment_forms import Rule
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.engine.torch_attention import Scores, _in_stacks, attend_segments
from mtl_lora_cli.kernels.tiles import FORWARD, KEY_BACKWARD, QUERY_BACKWARD, Launch, tile_table
from mtl_lora_cli.kernels.triton_attention import attention_backward, attention_forward

pytestmark = pytest.mark.slow  # in the interpreter: make kernels

SMALL = Launch(tile=16, step=16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    lengths: list[int]
    heads: int
    key_heads: int
    dim: int
    qkv: Tensor
    dout: Tensor
    turn: tuple[Tensor, Tensor] | None
    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "heads": self.heads,
            "key_heads": self.key_heads,
            "scaling": self.scaling,
            "window": self.window,
            "softcap": self.softcap,
        }


def draw(
    lengths: list[int],
    heads: int = 2,
    key_heads: int = 1,
    dim: int = 16,
    turn: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Case:
    generator = torch.Generator().manual_seed(0)
    count = sum(lengths)
    qkv = torch.randn(count, (heads + 2 * key_heads) * dim, generator=generator)
    dout = torch.randn(count, heads * dim, generator=generator)
    angles = torch.rand(count, dim // 2, generator=generator) * 6
    turns = (angles.cos().to(DEVICE), angles.sin().to(DEVICE)) if turn else None
    return Case(
        lengths,
        heads,
        key_heads,
        dim,
        qkv.to(DEVICE, dtype),
        dout.to(DEVICE, dtype),
        turns,
        0.7 / math.sqrt(dim),
    )


def table(case: Case, block: int, **options: Any) -> Tensor:
    return tile_table(case.lengths, block, **options).to(DEVICE)


def rotated(qkv: Tensor, case: Case, way: int) -> Tensor:
    """qkv with its queries and keys turned by way · θ; as it is where the case has no angles."""
    if case.turn is None:
        return qkv
    cos, sin = (angles.double()[:, None] for angles in case.turn)
    x = qkv.unflatten(1, (-1, case.dim))
    turned, values = x.split([case.heads + case.key_heads, case.key_heads], 1)
    a, b = turned.chunk(2, -1)
    turned = torch.cat([a * cos - way * b * sin, b * cos + way * a * sin], -1)
    return torch.cat([turned, values], 1).flatten(1)


def naive(case: Case, reach: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse [H, N] and dqkv of each segment alone, in float64, by autograd.

    With angles, `case.qkv` is what a rotation made, and dqkv the gradient of what it made it from.
    """
    before = rotated(case.qkv.double(), case, -1).requires_grad_()
    x = rotated(before, case, 1).unflatten(1, (-1, case.dim)).transpose(0, 1)
    q, k, v = x.split([case.heads, case.key_heads, case.key_heads])
    k, v = (part.repeat_interleave(case.heads // case.key_heads, 0) for part in (k, v))
    outs, logs = [], []
    start = 0
    for length in case.lengths:
        own = range(start, start + length)
        scores = case.scaling * q[:, own] @ k[:, own].mT
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        mask = torch.ones(scores.shape[1:], dtype=torch.bool, device=DEVICE).tril()
        if reach is not None:
            mask &= torch.tensor(own, device=DEVICE)[:, None] < reach[start : start + length]
        if case.window is not None:  # ancestors, of which without trees there are all before
            ancestors = mask.sum(1)
            mask &= ancestors[:, None] - ancestors < case.window
        scores = scores.masked_fill(~mask, -torch.inf)
        if case.sinks is not None:
            sinks = case.sinks.double()[:, None, None].expand(-1, length, 1)
            scores = torch.cat([scores, sinks], -1)
        outs.append(scores.softmax(-1)[..., :length] @ v[:, own])
        logs.append(scores.logsumexp(-1))
        start += length
    out = torch.cat(outs, 1).transpose(0, 1).flatten(1)
    (gradient,) = torch.autograd.grad(out, before, case.dout.double())
    return out.detach(), torch.cat(logs, 1).detach(), gradient


def run(
    case: Case,
    forward: Launch = SMALL,
    query: Launch = SMALL,
    key: Launch = SMALL,
    capacity: int | None = None,
    dqkv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = table(case, forward.tile, capacity=capacity)
    out, lse = attention_forward(case.qkv, tiles, sinks=case.sinks, launch=forward, **case.sizes)
    gradient = attention_backward(
        case.dout,
        case.qkv,
        out,
        lse,
        table(case, query.tile, capacity=capacity),
        table(case, key.tile, capacity=capacity, of_keys=True),
        turn=case.turn,
        dqkv=dqkv,
        query_launch=query,
        key_launch=key,
        **case.sizes,
    )
    return out, lse, gradient


def assert_as_naive(
    case: Case, found: tuple[Tensor, Tensor, Tensor], tolerance: float = 1e-5
) -> None:
    for ours, theirs in zip(found, naive(case), strict=True):
        limit = tolerance * float(theirs.abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=limit)


def apart(tensor: Tensor, more: int) -> Tensor:
    """The same values in rows that lie `more` elements further apart, NaN between them."""
    wide = torch.full((len(tensor), tensor.shape[1] + more), torch.nan, dtype=tensor.dtype)
    wide = wide.to(tensor.device)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


@pytest.mark.parametrize("turn", [True, False])
@pytest.mark.parametrize("lengths", [[1], [15, 16, 17], [1, 1, 50, 3], [32]])
def test_every_length_of_segment_gives_what_it_gives_alone(lengths: list[int], turn: bool) -> None:
    case = draw(lengths, turn=turn)
    assert_as_naive(case, run(case))


@pytest.mark.parametrize("turn", [True, False])
@pytest.mark.parametrize("heads, key_heads", [(2, 2), (4, 2), (4, 1)])
def test_query_heads_share_key_heads(heads: int, key_heads: int, turn: bool) -> None:
    case = draw([19, 5], heads, key_heads, turn=turn)
    assert_as_naive(case, run(case))


@pytest.mark.parametrize("turn", [True, False])
@pytest.mark.parametrize("dim", [8, 16, 24, 64, 96, 128])
def test_every_head_dimension_is_taken(dim: int, turn: bool) -> None:
    case = draw([18, 7], dim=dim, turn=turn)
    assert_as_naive(case, run(case))


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("tile, step", [(32, 16), (64, 16), (32, 32)])
def test_every_shape_of_programs_gives_the_same(tile: int, step: int, split: bool) -> None:
    case = draw([70, 9, 33])
    launch = Launch(tile, step, split=split)
    assert_as_naive(case, run(case, launch, launch, launch))


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 31, 33, 70, 100])
def test_a_window_hides_what_lies_before_it(window: int, split: bool) -> None:
    """On both sides of a step, of a tile, and of a segment's length."""
    case = draw([70, 9, 33])._replace(window=window)
    launch = Launch(32, 16, split=split)
    assert_as_naive(case, run(case, launch, launch, launch))


SINKS = torch.tensor([0.5, 4.0, -1.0, -9.0], device=DEVICE)  # shares from none to nearly all


def kinds(case: Case, window: int | None, cap: float | None, sinks: bool) -> Case:
    return case._replace(
        window=window, softcap=cap, sinks=SINKS[: case.heads] if sinks else None, scaling=0.6
    )


@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 20])
def test_windows_caps_and_sinks_go_together(
    window: int | None, cap: float | None, sinks: bool
) -> None:
    case = kinds(draw([37, 5]), window, cap, sinks)
    launch = Launch(32, 16, split=sinks == (window is None))
    assert_as_naive(case, run(case, launch, launch, launch))


def test_scores_far_beyond_a_cap_stay_finite() -> None:
    case = draw([20, 11])._replace(softcap=0.5, scaling=400.0)
    assert_as_naive(case, run(case), 1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_caps_and_sinks_round_like_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    case = kinds(draw([40, 21], dtype=dtype), 20, 3.0, True)
    assert_as_naive(case._replace(sinks=SINKS[:2].to(dtype)), run(case), tolerance)


@pytest.mark.parametrize("dim", [64, 128])
def test_the_default_shapes_know_a_window(dim: int) -> None:
    case = draw([150, 3], dim=dim)._replace(window=40)
    assert_as_naive(case, run(case, FORWARD[dim], QUERY_BACKWARD[dim], KEY_BACKWARD[dim]))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_default_shapes_are_right(dim: int) -> None:
    case = draw([70, 3], dim=dim)
    assert_as_naive(case, run(case, FORWARD[dim], QUERY_BACKWARD[dim], KEY_BACKWARD[dim]))


def test_heads_of_512_are_right() -> None:
    """On a card in half precision alone: a float32 of each does not fit in its shared memory."""
    half = DEVICE == "cuda"
    case = draw([17, 3], dim=512, turn=False, dtype=torch.bfloat16 if half else torch.float32)
    found = run(case, FORWARD[512], QUERY_BACKWARD[512], KEY_BACKWARD[512])
    assert_as_naive(case, found, 2e-2 if half else 1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_rounds_like_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    case = draw([40, 21], dtype=dtype)
    assert_as_naive(case, run(case), tolerance)


def test_rows_may_lie_apart() -> None:
    case = draw([20, 11])
    dqkv = apart(torch.empty_like(case.qkv), 24)
    wide = case._replace(qkv=apart(case.qkv, 16), dout=apart(case.dout, 8))
    *found, gradient = run(wide, dqkv=dqkv)
    assert gradient is dqkv
    assert_as_naive(case, (*found, gradient))


@pytest.mark.parametrize("dim", [16, 24])
def test_angles_may_lie_apart(dim: int) -> None:
    case = draw([20, 11], dim=dim)
    assert case.turn is not None
    cos, sin = (apart(angles, 8) for angles in case.turn)
    assert_as_naive(case, run(case._replace(turn=(cos, sin))))


def test_the_output_goes_where_it_is_asked_to_go() -> None:
    case = draw([20, 11])
    place = apart(torch.empty_like(case.dout), 8)
    tiles = table(case, 16)
    out, _ = attention_forward(case.qkv, tiles, out=place, launch=SMALL, **case.sizes)
    assert out is place
    expected, _ = attention_forward(case.qkv, tiles, launch=SMALL, **case.sizes)
    assert torch.equal(out, expected)


def test_unfilled_rows_of_a_table_change_nothing() -> None:
    case = draw([20, 11])
    for ours, theirs in zip(run(case, capacity=7), run(case), strict=True):
        assert torch.equal(ours, theirs)


def test_positions_that_no_tile_covers_are_not_written() -> None:
    case = draw([20, 11])
    tiles = tile_table([20], 16).to(DEVICE)
    out = torch.full_like(case.dout, 7.0)
    dqkv = torch.full_like(case.qkv, 7.0)
    _, lse = attention_forward(case.qkv, tiles, out=out, launch=SMALL, **case.sizes)
    attention_backward(
        case.dout, case.qkv, out, lse, tiles, tiles, turn=case.turn, dqkv=dqkv,
        query_launch=SMALL, key_launch=SMALL, **case.sizes,
    )  # fmt: skip
    assert (out[20:] == 7).all() and (dqkv[20:] == 7).all()
    assert (out[:20] != 7).all() and (dqkv[:20] != 7).all()


def tree(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("trees", [False, True], ids=["causal", "trees"])
@pytest.mark.parametrize("window", [None, 9])
def test_transformers_layers_get_caps_and_sinks_from_the_kernels(
    window: int | None, trees: bool
) -> None:
    """What the plain engine's layers call, beside the same in torch."""
    generator = torch.Generator().manual_seed(4)
    reach = tree(*[20] * 6, *[11] * 5, *[20] * 9, *[31] * 11) if trees else None
    segments = Segments.build([20, 11], reach).to(torch.device(DEVICE))
    q, k, v = (
        torch.randn(1, heads, 31, 16, generator=generator).to(DEVICE).requires_grad_()
        for heads in (4, 2, 2)
    )
    scores, rule = Scores(0.6, softcap=1.5, sinks=SINKS), Rule(window)
    assert kernels_take(q, k, v, segments, rule) or DEVICE == "cuda"
    found = attend_segments(q, k, v, scores, segments, rule)
    right = _in_stacks(q.double(), k.double(), v.double(), scores, segments, rule)
    torch.testing.assert_close(found.double(), right, rtol=0, atol=1e-5)
    dout = torch.randn(found.shape, generator=generator).to(DEVICE)
    ours = torch.autograd.grad(found, (q, k, v), dout)
    theirs = torch.autograd.grad(right, (q, k, v), dout.double())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("turn", [True, False])
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_neighbours_infinities_reach_nobody(value: float, turn: bool) -> None:
    case = draw([18, 9, 21], turn=turn)
    before = run(case)
    # Neither through the values that a tile reads beyond its end, nor through what comes back.
    case.qkv[18:27], case.dout[18:27] = value, value
    if case.turn is not None:
        for angles in case.turn:
            angles[18:27] = value
    after = run(case)
    for old, new in zip(before, after, strict=True):
        rows = (old.T, new.T) if old.shape == before[1].shape else (old, new)
        for part in (slice(0, 18), slice(27, None)):
            assert torch.equal(rows[0][part], rows[1][part])
        assert not rows[1][18:27].isfinite().all()


def test_two_runs_give_the_same_bits() -> None:
    case = draw([20, 11], heads=4, key_heads=2)
    for one, other in zip(run(case), run(case), strict=True):
        assert torch.equal(one, other)


def test_long_segments_come_first_and_their_tiles_stay_together() -> None:
    assert tile_table([3, 40, 17], 16).tolist() == [
        [35, 3, 43],
        [19, 3, 43],
        [3, 3, 43],
        [59, 43, 60],
        [43, 43, 60],
        [0, 0, 3],
    ]


def test_the_first_tile_of_keys_comes_first() -> None:
    assert tile_table([40], 16, of_keys=True)[:, 0].tolist() == [0, 16, 32]


def test_a_table_is_filled_up_to_its_capacity() -> None:
    assert tile_table([5, 2], 16, 3).tolist() == [[0, 0, 5], [5, 5, 7], [-1, 0, 0]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([], 16), "at least one position"),
        (([3, 0], 16), "at least one position"),
        (([40], 16, 2), "3 tiles of 16 do not fit a table of 2"),
    ],
)
def test_a_table_that_cannot_be_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tile_table(*arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 3, "key_heads": 2}, "do not share"),
        ({"heads": 3}, "do not hold"),
        ({"scaling": 0.0}, "must be positive"),
        ({"softcap": -1.0}, "soft cap must be positive"),
        ({"sinks": torch.zeros(3)}, "a logit for each of 2 heads"),
        ({"qkv": torch.zeros(8, 64, dtype=torch.float64)}, "received torch.float64"),
        ({"qkv": torch.zeros(8, 4 * 576)}, "at most 512, received 576"),
        ({"qkv": torch.zeros(64, 8).T}, "contiguous last axis"),
        ({"tiles": torch.zeros(1, 3)}, "table of tile_table"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    case = draw([8])
    arguments = {"qkv": case.qkv, "tiles": table(case, 16), **case.sizes, **change}
    with pytest.raises(ValueError, match=message):
        attention_forward(**arguments)


@pytest.mark.parametrize(
    "cos, sin, message",
    [
        (torch.zeros(8, 16), torch.zeros(8, 16), r"cos must be float32 \[8, 8\]"),
        (torch.zeros(8, 8), torch.zeros(8, 8).double(), "received torch.float64"),
        (torch.zeros(8, 8), torch.zeros(8, 16)[:, :8], "equal strides"),
    ],
)
def test_angles_that_do_not_fit_are_refused(cos: Tensor, sin: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(draw([8])._replace(turn=(cos, sin)))


@pytest.mark.parametrize("tile, step", [(48, 16), (16, 8), (32, 64)])
def test_a_shape_that_no_program_can_have_is_refused(tile: int, step: int) -> None:
    with pytest.raises(ValueError, match=r"tile|step"):
        Launch(tile, step)
