"""Each operation's kernel against its plain form, which the oracle tests hold against the formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from mtl_lora_cli.kernels import fp8, gated, logprob, mix, nf4, norm
from mtl_lora_cli.kernels.grouped import grouped
from mtl_lora_cli.kernels.head_norm import HeadNorms, head_norm, head_norm_gradient_
from mtl_lora_cli.kernels.place import Place, at_once, place_each
from mtl_lora_cli.kernels.rotary import Turn, rotate_
from mtl_lora_cli.kernels.runs import Runs, runs_of
from mtl_lora_cli.kernels.stream import After, Norm, enter, enter_gradient

pytestmark = pytest.mark.slow  # in the interpreter: make kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Result = Sequence[Tensor | None]
WIDTHS = [16, 48, 1030]


@pytest.fixture
def same(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs something on kernels and in plain torch and compares."""

    def check(run: Callable[[], Result], close: float = 1e-5) -> None:
        monkeypatch.setenv("MTL_LORA_KERNELS", "plain")
        plain = run()
        monkeypatch.setenv("MTL_LORA_KERNELS", "triton")
        for one, two in zip(run(), plain, strict=True):
            assert (one is None) == (two is None)
            if one is not None and two is not None:
                assert one.dtype == two.dtype
                torch.testing.assert_close(one, two, rtol=close, atol=close)

    return check


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("adds", [True, False])
def test_norms(same: Callable[..., None], width: int, adds: bool) -> None:
    x, weight = normal(5, width), normal(width, seed=1)
    delta = normal(5, width, seed=2) if adds else None
    same(lambda: norm.add_norm(x, delta, weight, 1e-5))
    _, _, inverse = norm.add_norm(x, None, weight, 1e-5)
    same(lambda: [norm.apply_norm(x, inverse, weight)])
    same(lambda: [norm.norm_gradient(normal(5, width, seed=3), delta, x, inverse, weight)])


def test_a_norms_gradient_is_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTL_LORA_KERNELS", "plain")
    x = normal(4, 24).double().requires_grad_()
    weight, dh, past = normal(24, seed=1).double(), normal(4, 24, seed=2).double(), normal(4, 24)
    total, normed, inverse = norm.add_norm(x, None, weight, 1e-5)
    (normed * dh).sum().backward()
    ours = norm.norm_gradient(dh, past.double(), total.detach(), inverse.detach(), weight)
    torch.testing.assert_close(ours, x.grad + past.double())


@pytest.mark.parametrize("room", [0, 24])
@pytest.mark.parametrize(
    ("behind", "multiplier", "before"),
    [
        (True, 1.0, True),
        (True, 0.4, False),
        (False, 0.4, True),
        (False, 0.4, False),
        (False, 1.0, True),
    ],
)
def test_norm_addition_norm_are_the_formulas(
    monkeypatch: pytest.MonkeyPatch, behind: bool, multiplier: float, before: bool, room: int
) -> None:
    """Kernels in float32 and plain torch in float64, both against torch's own norm and autograd in float64."""
    width = 48
    x, o, dh, past = (normal(5, width, seed=seed) for seed in range(4))
    weights = 1 + 0.3 * normal(width, seed=5), 1 + 0.3 * normal(width, seed=6)
    leaves = [one.double().requires_grad_() for one in (x, o)]
    rms = torch.nn.functional.rms_norm
    delta = rms(leaves[1], (width,), weights[0].double(), 1e-5) if behind else leaves[1]
    total = leaves[0] + multiplier * delta
    normed = rms(total, (width,), weights[1].double(), 1e-6) if before else total
    (normed * dh.double() + total * past.double()).sum().backward()
    for kernels, dtype, close in (("triton", torch.float32, 2e-5), ("plain", torch.float64, 1e-12)):
        monkeypatch.setenv("MTL_LORA_KERNELS", kernels)
        after = After(Norm(weights[0].to(dtype), 1e-5) if behind else None, multiplier)
        norm = Norm(weights[1].to(dtype), 1e-6) if before else None
        entry, h = enter(x.to(dtype), o.to(dtype), after, norm, room=room)
        dresidual = normal(5, width + 8, seed=9).to(dtype)
        dresidual[:, :width] = past
        found = enter_gradient(dh.to(dtype), dresidual[:, :width], entry, after, norm, room=room)
        assert h.shape == (5, width + room) and found[1].shape == (5, width + room)
        assert (entry.out is None) == (not behind)
        ours = (entry.total, h[:, :width], found[0], found[1][:, :width])
        right = (total.detach(), normed.detach(), leaves[0].grad, leaves[1].grad)
        for one, two in zip(ours, right, strict=True):
            torch.testing.assert_close(one.double(), two, rtol=close, atol=close)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(
    same: Callable[..., None], width: int, again: bool, activation: gated.Activation
) -> None:
    both, da = normal(5, 2 * width), normal(5, width, seed=1)
    same(lambda: [gated.gated(both, activation)])
    same(lambda: gated.gated_gradient(da, both.clone(), activation, again=again))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gated_activations_gradient_is_autograds(
    monkeypatch: pytest.MonkeyPatch, activation: gated.Activation
) -> None:
    monkeypatch.setenv("MTL_LORA_KERNELS", "plain")
    both = normal(4, 24).double().requires_grad_()
    da = normal(4, 12, seed=1).double()
    activated = gated.gated(both, activation)
    (activated * da).sum().backward()
    gradient, again = gated.gated_gradient(da, both.detach(), activation, again=True)
    torch.testing.assert_close(gradient, both.grad)
    torch.testing.assert_close(again, activated.detach())


def runs(positions: int) -> Tensor:
    """Slots of four tasks and of none: runs that end anywhere, a task in several, and single positions."""
    ends = torch.tensor([3, 70, 71, 72, 140, 150, 190, positions]).clamp(max=positions)
    tasks = torch.tensor([2, 0, -1, 3, 0, 1, -1, 2]).int()
    return tasks.repeat_interleave(torch.diff(ends, prepend=torch.zeros(1, dtype=torch.long)))


@pytest.mark.parametrize(
    ("m", "k", "filled"),
    [(24, 8, (24, 8)), (51, 17, (56, 24)), (6, 3, (8, 8)), (150, 70, (152, 72))],
)
@pytest.mark.parametrize("kernels", ["triton", "plain"])
def test_mixing_is_the_formula(
    monkeypatch: pytest.MonkeyPatch, m: int, k: int, filled: tuple[int, int], kernels: str
) -> None:
    """Position by position in float64; sizes are filled up with what must not be read, and with zeros."""
    monkeypatch.setenv("MTL_LORA_KERNELS", kernels)
    layers, positions = 1 if k > 64 else 2, 700 if k == 3 else 145 if k == 17 else 80
    if k == 3:  # one program sums over two pieces
        monkeypatch.setattr("mtl_lora_cli.kernels.triton_mix._SUMS", 1)
    mixing, slot = normal(layers, 4, m, k, seed=1), runs(positions).to(DEVICE)
    z, du = (normal(positions, layers, side, seed=side) for side in (k, m))
    own = mixing.double()[:, slot.clamp(min=0).long()] * (slot >= 0)[:, None, None]  # [J, N, m, k]
    right = (
        torch.einsum("jnmk,njk->njm", own, z.double()),
        torch.einsum("jnmk,njm->njk", own, du.double()),
        torch.stack([
            torch.einsum("njm,njk->jmk", du[slot == p].double(), z[slot == p].double())
            for p in range(4)
        ], dim=1),
    )  # fmt: skip
    nan = float("nan")
    wide_z = torch.nn.functional.pad(z, (0, filled[1] - k), value=nan).flatten(1)
    wide_du = torch.nn.functional.pad(du, (0, filled[0] - m), value=nan).flatten(1)
    together = torch.full((positions, 7 + layers * filled[0]), nan, device=DEVICE)
    u = mix.mix(wide_z, mixing, slot, width=filled[0], out=together[:, 7:])
    dz = mix.mix(wide_du, mixing, slot, transposed=True, width=filled[1])
    found = u.unflatten(1, (layers, -1)), dz.unflatten(1, (layers, -1))
    assert together[:, :7].isnan().all() and torch.equal(together[:, 7:], u)
    for each, exact, side in zip(found, right, (m, k), strict=False):
        torch.testing.assert_close(each[..., :side].double(), exact, rtol=1e-5, atol=1e-4)
        assert not each[..., side:].any()
    for pieces in (None, runs_of(slot.cpu(), 4), runs_of(slot.cpu(), 4, 40)):
        there = None if pieces is None else Runs(*(one.to(DEVICE) for one in pieces))
        dmixing = mix.mix_gradient(wide_du, wide_z, slot, mixing.shape, there)
        torch.testing.assert_close(dmixing.double(), right[2], rtol=1e-5, atol=1e-3)


def test_runs_are_the_positions_of_their_slots() -> None:
    slot = torch.tensor([2] * 300 + [-1] * 5 + [0] * 128 + [2] + [1] * 129 + [-1]).int()
    pieces, ends = runs_of(slot, slots=4, capacity=12)
    assert ends.tolist() == [0, 1, 3, 7, 7], "of slot 3 there is none"
    for number in range(4):
        own = [range(*piece) for piece in pieces[ends[number] : ends[number + 1]].tolist()]
        assert all(0 < len(one) <= 128 for one in own)
        places = [place for one in own for place in one]
        assert places == torch.nonzero(slot == number)[:, 0].tolist()
    assert not pieces[7:].any()
    with pytest.raises(ValueError, match="7 pieces do not fit a table of 6"):
        runs_of(slot, slots=4, capacity=6)
    assert runs_of(torch.full((9,), -1).int(), 2).ends.tolist() == [0, 0, 0]


def test_mixing_rounds_no_matrix_to_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what it writes is rounded: to half a step of a number's own size."""
    monkeypatch.setenv("MTL_LORA_KERNELS", "triton")
    half = (
        torch.bfloat16 if DEVICE == "cuda" else torch.float16
    )  # the interpreter cuts bfloat16 off
    mixing, slot = normal(1, 4, 96, 32, seed=1), runs(200).to(DEVICE)
    z = normal(200, 32).to(half)
    own = mixing.double()[0, slot.clamp(min=0).long()] * (slot >= 0)[:, None, None]
    exact = torch.einsum("nmk,nk->nm", own, z.double())
    error = (mix.mix(z, mixing, slot).double() - exact).abs()
    assert (error <= torch.finfo(half).eps / 2 * 1.02 * exact.abs() + 1e-4).all()


def test_only_tasks_positions_are_kept(same: Callable[..., None]) -> None:
    """What stands where no task is need be no number."""
    slot = runs(200).to(DEVICE)
    active, z = (slot >= 0)[:, None], normal(200, 40)
    z[~active[:, 0]] = float("nan")
    together = torch.zeros(200, 60, device=DEVICE)
    same(lambda: [mix.of_tasks(z, slot, active), mix.of_tasks(z, slot, active, together[:, 16:56])])
    assert torch.equal(together[:, 16:56][active[:, 0]], z[active[:, 0]])
    assert not together[:, :16].any() and not together[~active[:, 0]].any()


def test_mixing_keeps_one_tasks_infinities_from_the_others() -> None:
    z, mixing = normal(40, 8), normal(1, 3, 24, 8, seed=1)
    slot = (torch.arange(40) % 4 - 1).int().to(DEVICE)
    before = mix.mix(z, mixing, slot)
    poisoned = mixing.clone()
    poisoned[:, 1] = float("nan")
    after = mix.mix(z, poisoned, slot)
    assert torch.equal(before[slot != 1], after[slot != 1])
    assert after[slot == 1].isnan().all()
    z[slot == 1] = float("inf")
    places = Runs(*(one.to(DEVICE) for one in runs_of(slot.cpu(), 3)))
    gradient = mix.mix_gradient(before, z, slot, mixing.shape, places)
    assert gradient[:, [0, 2]].isfinite().all()
    gradient = mix.mix_gradient(before, z, slot, mixing.shape)
    assert gradient[:, [0, 2]].isfinite().all()


def test_placing_many_matrices_is_placing_each() -> None:
    """Bit by bit, scaled by no power of two, into margins of a matrix in 16 bits; the rest stays as it is."""
    from mtl_lora_cli.kernels.triton_place import Table

    half = (
        torch.bfloat16 if DEVICE == "cuda" else torch.float16
    )  # the interpreter cuts bfloat16 off
    down, up = normal(1, 8, 1500), normal(3, 40, 8, seed=1)

    def places(together: Tensor) -> list[Place]:
        below, beside = together[40:48, :1500], together[:40, 1500:1524]
        own = beside.unflatten(1, (3, 8)).permute(1, 0, 2)
        return [Place(down, below.unsqueeze(0), 1.0), Place(up, own, 0.3)]

    one, two = (normal(48, 1600, seed=2).to(half)[:, :1524] for _ in range(2))
    place_each(places(one))
    assert at_once(places(two))
    table = Table(places(two))
    table.write()
    assert torch.equal(one, two)
    assert torch.equal(one[40:, :1500], down[0].to(half))
    assert torch.equal(one[:40, 1508:1516], (0.3 * up[1]).to(half))
    up.mul_(2)  # as they are when it is called
    table.write()
    assert torch.equal(two[:40, 1508:1516], (0.3 * up[1]).to(half))


@pytest.mark.parametrize("shape", [(48, 64), (32, 128), (6, 96)])
def test_expanding_four_bits(same: Callable[..., None], shape: tuple[int, int]) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = normal(*shape)
    packed, state = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    out = torch.zeros(shape[0], shape[1] + 16, device=DEVICE)
    same(lambda: [nf4.expand(packed, state, out[:, : shape[1]]).clone()], 1e-6)
    assert not out[:, shape[1] :].any()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(3, 64), (3000, 4096), (65, 1792)])
def test_levels_in_registers(half: torch.dtype, kind: str, shape: tuple[int, int]) -> None:
    """On a card four bytes a thread give the bits that one gives."""
    bnb = pytest.importorskip("bitsandbytes")
    weight = normal(*shape).to(half)
    packed, state = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type=kind)
    one_by_one = nf4.expand(packed, state, torch.empty(shape, device=DEVICE))  # float32: in bytes
    theirs = bnb.functional.dequantize_4bit(packed, state)
    out = torch.zeros(shape[0], shape[1] + 64, dtype=half, device=DEVICE)
    found = nf4.expand(packed, state, out[:, : shape[1]])
    assert torch.equal(found, one_by_one.to(half))
    assert not out[:, shape[1] :].any()
    torch.testing.assert_close(found, theirs, rtol=0.01, atol=0)


@pytest.mark.parametrize("width", [16, 5000, 49_152])
def test_log_probabilities(same: Callable[..., None], width: int) -> None:
    owner = torch.tensor([0, 1, 2, 2, 4]).to(DEVICE)
    targets = torch.tensor([3, 0, width - 1, 5, 7]).to(DEVICE)

    def run() -> Result:
        logits = (10 * normal(5, width)).requires_grad_()
        found = logprob.token_logprobs(logits, owner, targets)
        (found * torch.arange(1.0, 6.0, device=DEVICE)).sum().backward()
        return found, logits.grad

    same(run, 1e-4)
    logits = (10 * normal(5, width)).double().requires_grad_()
    plain = logits.log_softmax(-1)[owner, targets]
    (plain * torch.arange(1.0, 6.0, device=DEVICE)).sum().backward()
    found, gradient = run()
    torch.testing.assert_close(found, plain.float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, logits.grad.float(), rtol=1e-4, atol=1e-4)


def test_log_probabilities_where_a_lane_saw_minus_infinity(same: Callable[..., None]) -> None:
    logits = normal(2, 5000)
    logits[0, :4990] = float("-inf")
    last = torch.tensor([4999, 4999]).to(DEVICE)
    same(lambda: [logprob.token_logprobs(logits, torch.tensor([0, 1]).to(DEVICE), last)])


@pytest.mark.parametrize("width", [16, 5000])
def test_rounding_to_eight_bit_floats(same: Callable[..., None], width: int) -> None:
    x = normal(6, width) * torch.logspace(-6, 3, 6, device=DEVICE)[:, None]
    x[3] = 0

    def run() -> Result:
        rows = fp8.to_rows(x)
        return rows.values.float() * rows.scale, rows.scale

    same(run, 0.13)  # a quotient beside a border may round to either side: one step of 1/8


@pytest.mark.parametrize("width", [16, 5000])
def test_rounding_to_eight_bit_floats_loses_a_sixteenth_at_most(width: int) -> None:
    x = normal(6, width) * torch.logspace(-6, 3, 6, device=DEVICE)[:, None]
    rows = fp8.to_rows(x)
    back = rows.values.float() * rows.scale
    assert ((back - x).abs() <= x.abs() / 16 + x.abs().amax(1, keepdim=True) * 2**-18).all()


def test_a_product_in_eight_bit_floats_is_near_the_exact_one() -> None:
    x, weight = normal(64, 512), normal(32, 512, seed=1)
    exact = x @ weight.T
    ours = fp8.product(
        fp8.to_rows(x), fp8.to_rows(weight), torch.float32 if DEVICE == "cpu" else torch.bfloat16
    )
    assert (ours.float() - exact).norm() / exact.norm() < 0.05


HEADS, KEY_HEADS, DIM = 6, 2, 12


def head_norms(over: str) -> HeadNorms:
    """Weights of the two kinds: over each head, over all heads together."""
    q, k = (DIM, DIM) if over == "head" else (HEADS * DIM, KEY_HEADS * DIM)
    return HeadNorms(normal(q, seed=1), normal(k, seed=2), 1e-5)


def turn_of(columns: int, pairs: bool = False, rows: int = 5) -> Turn | None:
    """Angles for so many columns of a head."""
    angles = normal(rows, columns // 2, seed=4)
    return Turn(angles.cos(), angles.sin(), pairs) if columns else None


def turned_by_formula(x: Tensor, turn: Turn) -> Tensor:
    """[N, H, D]: each pair of columns times (cos, −sin; sin, cos), written out."""
    half, out = turn.cos.shape[1], x.clone()
    for i in range(half):
        one, two = (2 * i, 2 * i + 1) if turn.pairs else (i, i + half)
        c, s = turn.cos[:, i, None], turn.sin[:, i, None]
        out[..., one] = x[..., one] * c - x[..., two] * s
        out[..., two] = x[..., two] * c + x[..., one] * s
    return out


@pytest.mark.parametrize(
    ("over", "turning", "pairs"),
    [
        ("head", 0, False),
        ("head", DIM, False),
        ("head", 8, True),
        ("all", DIM, False),
        ("all", 6, False),
    ],
)
def test_normed_and_turned_heads_are_the_formulas(
    monkeypatch: pytest.MonkeyPatch, over: str, turning: int, pairs: bool
) -> None:
    """Kernels in float32 and plain torch in float64, both against torch's own norm and autograd in float64."""
    norms, turn = head_norms(over), turn_of(turning, pairs)
    sizes = {"heads": HEADS, "key_heads": KEY_HEADS}
    x, dh = (
        normal(5, (HEADS + 2 * KEY_HEADS) * DIM),
        normal(5, (HEADS + 2 * KEY_HEADS) * DIM + 8, seed=3),
    )
    exact = None if turn is None else Turn(turn.cos.double(), turn.sin.double(), pairs)
    right = x.double().requires_grad_()
    parts = []
    q, k, v = right.split([HEADS * DIM, KEY_HEADS * DIM, KEY_HEADS * DIM], 1)
    for part, weight in ((q, norms.q.double()), (k, norms.k.double())):
        normed = torch.nn.functional.rms_norm(
            part.unflatten(1, (-1, len(weight))), (len(weight),), weight, 1e-5
        )
        each = normed.flatten(1).unflatten(1, (-1, DIM))
        parts.append(each if exact is None else turned_by_formula(each, exact))
    out = torch.cat([*(part.flatten(1) for part in parts), v], 1)
    (out * dh[:, : x.shape[1]].double()).sum().backward()
    for kernels, dtype, close in (("triton", torch.float32, 1e-5), ("plain", torch.float64, 1e-12)):
        monkeypatch.setenv("MTL_LORA_KERNELS", kernels)
        own = HeadNorms(norms.q.to(dtype), norms.k.to(dtype), 1e-5)
        by = turn if dtype == torch.float32 else exact
        found = head_norm(x.to(dtype), own, by, **sizes)
        torch.testing.assert_close(found.double(), out.detach(), rtol=close, atol=close)
        wide = dh.to(dtype, copy=True)
        head_norm_gradient_(wide[:, : x.shape[1]], x.to(dtype), own, by, **sizes)
        gradient = wide[:, : x.shape[1]].double()
        torch.testing.assert_close(gradient, right.grad, rtol=close, atol=close)
        assert torch.equal(wide[:, x.shape[1] :], dh[:, x.shape[1] :].to(dtype))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("turning", [12, 8])
def test_rotation(same: Callable[..., None], turning: int, pairs: bool) -> None:
    """All columns of a head, or its first ones; halves or neighbours."""
    turn = turn_of(turning, pairs)
    assert turn is not None
    qkv = normal(5, (HEADS + 2 * KEY_HEADS) * DIM)

    def turned() -> Result:
        sizes = {"heads": HEADS, "key_heads": KEY_HEADS}
        there = rotate_(qkv.clone(), turn, **sizes)
        return [there, rotate_(there.clone(), turn, **sizes, back=True)]

    same(turned)
    torch.testing.assert_close(turned()[1], qkv)
    own = turned()[0]
    assert own is not None
    before, after = (x.unflatten(1, (-1, DIM)) for x in (qkv, own))
    assert torch.equal(before[..., turning:], after[..., turning:])
    assert torch.equal(before[:, HEADS + KEY_HEADS :], after[:, HEADS + KEY_HEADS :])
    one, two = before[:, 0, 0], before[:, 0, 1 if pairs else turning // 2]
    expected = one * turn.cos[:, 0] - two * turn.sin[:, 0]
    torch.testing.assert_close(after[:, 0, 0], expected)


def test_a_norm_whose_weight_is_wider_is_gemmas(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 + w in float32 beside activations of 16 bit: rounded once, behind the product."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    monkeypatch.setenv("MTL_LORA_KERNELS", "plain")
    theirs = Gemma2RMSNorm(48, eps=1e-5).to(DEVICE, torch.bfloat16)
    theirs.weight.data.copy_(normal(48, seed=1))
    x = normal(5, 48).bfloat16()
    total, ours, inverse = norm.add_norm(x, None, 1 + theirs.weight.float(), 1e-5)
    assert torch.equal(ours, theirs(x))
    assert torch.equal(norm.apply_norm(total, inverse, 1 + theirs.weight.float()), ours)


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products_are_each_rows_own(transposed: bool) -> None:
    """Three groups of four have rows; on a card in bfloat16 it is torch's grouped product."""
    counts = torch.tensor([5, 0, 9, 2], device=DEVICE)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float64
    weights = normal(4, 24, 16).to(dtype)
    x = normal(16, 24 if transposed else 16, seed=1).to(dtype)
    own = weights.double()[torch.arange(4, device=DEVICE).repeat_interleave(counts)]
    own = own.mT if transposed else own
    expected = torch.einsum("soi,si->so", own, x.double())
    found = grouped(x, weights, counts.cumsum(0).int(), transposed=transposed)
    close = 2e-2 if DEVICE == "cuda" else 1e-12
    torch.testing.assert_close(found.double(), expected, rtol=close, atol=close)
