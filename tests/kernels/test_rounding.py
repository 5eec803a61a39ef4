"""What is rounded to 8-bit floats where it is made is what rounding it afterwards gives, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.engine.saved import Keep
from mtl_lora_cli.kernels import fp8, gated, norm, rotary, rounding, stream
from mtl_lora_cli.kernels.fp8 import Form, Rounded
from mtl_lora_cli.kernels.low_rank import add_product_
from mtl_lora_cli.kernels.rotary import Turn
from mtl_lora_cli.kernels.stream import After, Norm
from mtl_lora_cli.models.packed import PackedModel

from ..engine import test_families_rounded
from ..engine.double import RANK, SCALE, TASKS, UPS, examples, tiny
from ..engine.test_families_rounded import KINDS, learned, multiply_in_eight_bits

pytestmark = pytest.mark.slow  # in the interpreter: make kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS: tuple[Form, ...] = ("both", "eight")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of many magnitudes, one of them zero."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if len(shape) == 2:
        x *= torch.logspace(-2, 1, shape[0])[:, None]
        x[1] = 0
    return x.to(DEVICE, dtype)


def require_same(made: Any, exact: Tensor, form: Form) -> None:
    """Rows as of `exact`, near it, and `exact` itself where it was asked for."""
    assert isinstance(made, Rounded) and made.dtype == exact.dtype
    rows = fp8.to_rows(exact)
    assert torch.equal(made.rows.scale, rows.scale)
    assert torch.equal(made.rows.values.float(), rows.values.float())
    back, right = made.rows.values.float() * made.rows.scale, exact.float()
    most = right.abs().amax(1, keepdim=True)
    torch.testing.assert_close(made.rows.scale, most.clamp(min=1e-12) / 448)
    assert ((back - right).abs() <= right.abs() / 16 + most * 2**-18).all()
    assert (made.exact is None) == (form == "eight")
    assert made.exact is None or torch.equal(made.exact, exact)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("width", "dtype"), [(48, torch.float32), (1030, torch.float16)])
def test_norms(form: Form, width: int, dtype: torch.dtype) -> None:
    x, delta, dh, past = (normal(5, width, seed=seed, dtype=dtype) for seed in range(4))
    weight = normal(width, seed=5, dtype=dtype)
    right = norm.add_norm(x, delta, weight, 1e-5)
    entry, made = rounding.enter(x, delta, After(), Norm(weight, 1e-5), form)
    assert torch.equal(entry.total, right[0])
    require_same(made, right[1], form)
    again = rounding.apply_norm(entry.total, right[2], weight, form)
    require_same(again, norm.apply_norm(right[0], right[2], weight), form)
    exact = norm.norm_gradient(dh, past, right[0], right[2], weight)
    dx, dout, rows = rounding.enter_gradient(dh, past, entry, After(), Norm(weight, 1e-5), form)
    assert rows is not None and torch.equal(dx, exact)
    require_same(Rounded(rows, dout, dtype), exact, "both")


@pytest.mark.parametrize(
    ("form", "behind", "before"),
    [("both", True, True), ("eight", True, False), ("eight", False, True), ("both", False, False)],
)
def test_where_outputs_are_normed_or_multiplied(form: Form, behind: bool, before: bool) -> None:
    x, out, dh, past = (normal(5, 48, seed=seed) for seed in range(4))
    after = After(Norm(1 + normal(48, seed=5) / 4, 1e-5) if behind else None, 0.4)
    begin = Norm(1 + normal(48, seed=6) / 4, 1e-6) if before else None
    entry, h = stream.enter(x, out, after, begin)
    again, made = rounding.enter(x, out, after, begin, form)
    assert torch.equal(entry.total, again.total)
    require_same(made, h, form)
    dx, dout = stream.enter_gradient(dh, past, entry, after, begin)
    found = rounding.enter_gradient(dh, past, again, after, begin, form)
    assert found[2] is not None and torch.equal(found[0], dx)
    require_same(Rounded(found[2], found[1], x.dtype), dout, "both")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("activation", "width", "dtype"),
    [("silu", 1030, torch.float16), ("silu", 48, torch.float32), ("gelu_tanh", 48, torch.float32)],
)
def test_gated(form: Form, activation: gated.Activation, width: int, dtype: torch.dtype) -> None:
    both, da = normal(5, 2 * width, dtype=dtype), normal(5, width, seed=1, dtype=dtype)
    require_same(rounding.gated(both, activation, form), gated.gated(both, activation), form)
    for again in (True, False):
        right, active = gated.gated_gradient(da, both.clone(), activation, again=again)
        found = rounding.gated_gradient(da, both.clone(), activation, form, again=again)
        require_same(found[0], right, form)
        assert (found[1] is None) == (active is None)
        assert active is None or torch.equal(found[1], active)  # type: ignore[arg-type]


def test_activations_too_wide_for_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from mtl_lora_cli.kernels import triton_rounding

    both, da = normal(5, 96), normal(5, 48, seed=1)
    held = rounding.gated(both, "silu", "eight"), rounding.gated_gradient(da, both, "silu", "eight")
    monkeypatch.setattr(triton_rounding, "WIDEST", 47)
    require_same(held[0], gated.gated(both, "silu"), "eight")
    wide = rounding.gated_gradient(da, both.clone(), "silu", "eight")[0]
    assert isinstance(held[1][0], Rounded) and isinstance(wide, Rounded)
    assert torch.equal(held[1][0].rows.scale, wide.rows.scale)


@pytest.mark.parametrize(
    ("form", "columns", "pairs"),
    [("both", 12, False), ("eight", 12, False), ("eight", 8, False), ("both", 12, True)],
)
def test_turning_back(form: Form, columns: int, pairs: bool) -> None:
    angles = normal(5, columns // 2, seed=4)
    turn = Turn(angles.cos(), angles.sin(), pairs)
    dqkv = normal(5, 10 * 12)
    right = rotary.rotate_(dqkv.clone(), turn, heads=6, key_heads=2, back=True)
    made = rounding.rotate_back(dqkv.clone(), turn, form, heads=6, key_heads=2)
    require_same(made, right, form)


@pytest.mark.parametrize(
    ("rank", "dtype"), [(3, torch.float32), (24, torch.float16), (130, torch.float32)]
)
def test_a_product_of_low_rank_is_added_in_place(rank: int, dtype: torch.dtype) -> None:
    """Wherever the rows of Y lie and however U and V do, and nothing beside Y is touched."""
    wide, u = normal(70, 300, dtype=dtype), normal(rank, 70, seed=1, dtype=dtype).T
    v, before = normal(140, rank, seed=2, dtype=dtype), wide.clone()
    y = wide[:, 100:240]
    right = y.double() + u.double() @ v.double().T
    assert add_product_(y, u, v) is y
    step = 1e-4 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(y.double(), right, rtol=step, atol=step)
    assert torch.equal(wide[:, :100], before[:, :100])
    assert torch.equal(wide[:, 240:], before[:, 240:])


FOUR = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter, on a CPU")
@pytest.mark.parametrize(
    ("name", "targets", "keep"),
    [
        ("llama", FOUR, Keep()),
        pytest.param(
            "llama",
            (*FOUR, "gate_proj", "down_proj"),
            Keep(False, False, False),
            marks=pytest.mark.long,
        ),
        pytest.param("gemma2 caps", FOUR, Keep(False, False, False), marks=pytest.mark.long),
        pytest.param("glm part, pairs", FOUR, Keep(), marks=pytest.mark.long),
        pytest.param("olmo2", FOUR, Keep(), marks=pytest.mark.long),
    ],
)
def test_the_engine_rounds_as_the_formula_and_where_numbers_are_made(
    name: str, targets: tuple[str, ...], keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against transformers with the same roundings; only some operands are rounded in a pass of their own."""
    kind, changes = KINDS[name]
    if name == "llama":
        changes = {**changes, "num_hidden_layers": 2}
    monkeypatch.setattr(test_families_rounded, "examples", lambda: [examples()[n] for n in (1, 2)])
    model: Any = tiny(kind, **changes).float()
    bare = copy.deepcopy(model)
    multiply_in_eight_bits(bare)
    config = configure(
        rank=RANK, alpha=SCALE * RANK, up_projections=UPS, temperature=0.5, target_modules=targets
    )
    adapter = inject(model, config, TASKS)
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    monkeypatch.setenv("MTL_LORA_KERNELS", "plain")  # weights are rounded once
    packed = PackedModel(model, adapter, engine="fused", base_compute="fp8", keep=keep).train()
    monkeypatch.setenv("MTL_LORA_KERNELS", "triton")
    passes: list[int] = []
    with monkeypatch.context() as patch:
        for module in (fp8, rounding):
            right = module.to_rows
            patch.setattr(module, "to_rows", lambda x, right=right: passes.append(1) or right(x))
        near = learned(bare, packed, adapter)
    assert near[0] < 5e-3 and near[1] < 0.15
    layers = len(model.model.layers)
    # Attention's result; where neighbours turn, or queries are normed, its gradient; what the first layer of OLMo reads
    # without a norm, and nobody wants the gradient there.
    assert len(passes) == layers * (2 if "pairs" in name or name == "olmo2" else 1)
