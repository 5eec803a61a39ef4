"""The fused engine against transformers' own layers: outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_lora_cli.adapters import frozen
from mtl_lora_cli.adapters.inject import Adapter, inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.engine.saved import Keep
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.load import load_model
from mtl_lora_cli.models.packed import PackedBatch, PackedModel

SEVEN = ("*_proj",)
FOUR = ("q_proj", "k_proj", "v_proj", "o_proj")
CLOSE = 1e-4  # transformers' norms, the head and the log-probabilities are float32
MakeBatch = Callable[..., PackedBatch]


def build(
    base: BaseModel,
    *,
    quantization: str = "none",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **config: Any,
) -> tuple[Any, Adapter]:
    """The tiny model with an adapter of three tasks that is far from its start."""
    torch.manual_seed(seed)
    model = load_model(
        base, dtype=torch.float32, device=torch.device("cpu"), quantization=quantization
    )
    if quantization == "none":
        model.to(dtype)
    adapter = inject(model, configure(**config), ("one", "two", "three"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
    return model, adapter


def learned(
    packed: PackedModel, adapter: Adapter, batch: PackedBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities, and the gradients of a weighting of them."""
    for tensor in adapter.tensors().values():
        tensor.grad = None
    with packed.routed(batch):
        logprobs = packed(batch)
        (logprobs * torch.linspace(1, 2, len(logprobs))).sum().backward()
    grads = {name: t.grad.clone() for name, t in adapter.tensors().items() if t.grad is not None}
    return logprobs.detach(), grads


def assert_alike(
    one: tuple[Tensor, dict[str, Tensor]], two: tuple[Tensor, dict[str, Tensor]], close: float
) -> None:
    torch.testing.assert_close(one[0], two[0], rtol=close, atol=close)
    assert one[1].keys() == two[1].keys()
    for name, gradient in one[1].items():
        error = (gradient - two[1][name]).norm() / two[1][name].norm().clamp(min=1e-9)
        assert error < close, f"{name}: {error}"


@pytest.fixture
def batch(make_batch: MakeBatch) -> PackedBatch:
    """Five examples of three tasks and of none; only some positions are asked for."""
    return make_batch([17, 1, 40, 9, 23], [0, 2, -1, 1, 0], every=3)


@pytest.mark.parametrize(
    "targets", [SEVEN, FOUR, ("q_proj", "v_proj"), ("k_proj", "up_proj"), ("down_proj",)]
)
@pytest.mark.parametrize("gate", ["weights", "embedding"])
def test_equals_the_plain_layers(
    base: BaseModel, batch: PackedBatch, targets: tuple[str, ...], gate: str
) -> None:
    model, adapter = build(base, target_modules=targets, gate=gate)
    plain = learned(PackedModel(model, adapter, engine="plain"), adapter, batch)
    fused = learned(PackedModel(model, adapter, engine="fused"), adapter, batch)
    assert len(plain[1]) == len(adapter.tensors())
    assert_alike(fused, plain, CLOSE)


@pytest.mark.parametrize("transform", ["full", "diagonal", "bases"])
@pytest.mark.parametrize("n", [1, 3])
def test_equals_the_plain_layers_for_other_forms(
    base: BaseModel, batch: PackedBatch, transform: str, n: int
) -> None:
    model, adapter = build(base, target_modules=SEVEN, transform=transform, up_projections=n)
    plain = learned(PackedModel(model, adapter, engine="plain"), adapter, batch)
    fused = learned(PackedModel(model, adapter, engine="fused"), adapter, batch)
    assert_alike(fused, plain, CLOSE)


@pytest.mark.parametrize(
    "config",
    [
        {"method": "lora"},
        {"method": "mtl-lora-fine", "up_rank": 3},
        {"method": "mtlora", "task_rank": 2},
        {"method": "moelora", "up_projections": 4},
        {"method": "multilora", "up_projections": 2},
        {"method": "hydralora", "up_projections": 2},
        {"method": "lora", "scaling": "sqrt_rank", "rank_pattern": {"down_proj": 3, "o_proj": 2}},
    ],
    ids=lambda config: config["method"],
)
@pytest.mark.parametrize("targets", [SEVEN, ("q_proj", "v_proj", "down_proj", "o_proj")])
def test_equals_the_plain_layers_for_every_method(
    base: BaseModel, batch: PackedBatch, config: dict[str, Any], targets: tuple[str, ...]
) -> None:
    model, adapter = build(base, target_modules=targets, **config)
    plain = learned(PackedModel(model, adapter, engine="plain"), adapter, batch)
    fused = learned(PackedModel(model, adapter, engine="fused"), adapter, batch)
    assert_alike(fused, plain, CLOSE)


@pytest.mark.parametrize(
    "modules",
    [("o_proj",), ("down_proj", "q_proj", "k_proj", "v_proj"), ("*.layers.[34].*",)],
    ids=",".join,
)
def test_parts_of_tasks_own_in_some_groups_equal_the_plain_layers(
    base: BaseModel, batch: PackedBatch, modules: tuple[str, ...]
) -> None:
    form: dict[str, Any] = {"method": "mtlora", "task_rank": 2, "task_modules": modules}
    model, adapter = build(base, target_modules=SEVEN, **form)
    own = [path for path, layer in adapter.layers.items() if hasattr(layer, "task_lora_A")]
    assert 0 < len(own) < len(adapter.layers)
    plain = learned(PackedModel(model, adapter, engine="plain"), adapter, batch)
    fused = learned(PackedModel(model, adapter, engine="fused"), adapter, batch)
    assert len(plain[1]) == len(adapter.tensors())
    assert_alike(fused, plain, CLOSE)


RANKS = {"rank": 5, "rank_pattern": {"k_proj": 2, "o_proj": 11, "up_proj": 7}}


@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize(
    "form",
    [
        {"method": "lora", **RANKS},
        {"method": "mtl-lora", **RANKS},
        {"method": "mtl-lora-fine", "up_rank": 2, **RANKS},
        {"method": "moelora", "up_projections": 3, "rank": 3, "rank_pattern": {"v_proj": 6}},
        {"method": "multilora", "up_projections": 2, **RANKS},
        {"method": "hydralora", "up_projections": 3, **RANKS},
        {"method": "mtlora", "task_rank": 2, **RANKS},
        {"method": "mtlora", "task_rank": 2, "task_modules": ("v_proj", "o_proj"), **RANKS},
    ],
    ids=lambda form: f"{form['method']}{' in some' * ('task_modules' in form)}",
)
def test_layers_that_differ_within_a_group_equal_the_plain_layers(
    base: BaseModel,
    batch: PackedBatch,
    form: dict[str, Any],
    step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ranks and parts of tasks' own, in sizes as they are and filled up with zeros, which stand in margins then."""
    model, adapter = build(base, target_modules=SEVEN, **form)
    plain = learned(PackedModel(model, adapter, engine="plain"), adapter, batch)
    monkeypatch.setattr(frozen, "step_of", lambda like, dtype: step)
    packed = PackedModel(model, adapter, engine="fused")
    assert packed.decoder is not None
    room = packed.decoder.layers[0].attention.qkv.room
    assert (room.rows > 0) == (step == 8) and not room.rows % (3 * step)
    fused = learned(packed, adapter, batch)
    assert len(fused[1]) == len(adapter.tensors())
    assert_alike(fused, plain, CLOSE)


def test_a_way_of_mixing_that_differs_within_a_group_takes_the_plain_layers(
    base: BaseModel,
) -> None:
    model, adapter = build(base, target_modules=SEVEN, method="lora")
    layer = next(one for path, one in adapter.layers.items() if path.endswith("k_proj"))
    layer.config = layer.config.changed(dropout=0.5)
    packed = PackedModel(model, adapter)
    assert packed.decoder is None
    assert "mixing that differ within self_attn.q_proj" in packed.notes()[0]
    with pytest.raises(UsageError, match=r"mixing that differ within self_attn\.q_proj, .* layer"):
        PackedModel(model, adapter, engine="fused")


@pytest.mark.parametrize(
    "keep",
    [
        Keep(attended=False),
        Keep(qkv=False),
        Keep(gate_up=False),
        Keep(attended=False, qkv=False, gate_up=False),
    ],
    ids=lambda keep: ",".join(name for name, kept in vars(keep).items() if not kept),
)
@pytest.mark.parametrize("targets", [SEVEN, ("o_proj",)])
def test_what_is_computed_again_changes_no_bit(
    base: BaseModel, batch: PackedBatch, keep: Keep, targets: tuple[str, ...]
) -> None:
    model, adapter = build(base, dtype=torch.float32, target_modules=targets)
    kept = learned(PackedModel(model, adapter, engine="fused"), adapter, batch)
    again = learned(PackedModel(model, adapter, engine="fused", keep=keep), adapter, batch)
    assert torch.equal(kept[0], again[0])
    assert all(torch.equal(kept[1][name], again[1][name]) for name in kept[1])


def test_dropout_drops_the_same_features_when_computed_again(
    base: BaseModel, batch: PackedBatch
) -> None:
    model, adapter = build(base, dtype=torch.float32, target_modules=SEVEN, dropout=0.3)
    results = []
    for keep in (Keep(), Keep(attended=False, qkv=False, gate_up=False)):
        torch.manual_seed(5)
        packed = PackedModel(model, adapter, engine="fused", keep=keep).train()
        results.append(learned(packed, adapter, batch))
    assert all(torch.equal(results[0][1][n], results[1][1][n]) for n in results[0][1])
    calm = learned(PackedModel(model, adapter, engine="fused").eval(), adapter, batch)
    assert not torch.allclose(calm[0], results[0][0])


def test_gradients_with_dropout_equal_differences(base: BaseModel, batch: PackedBatch) -> None:
    """Along a random direction of all trained values, with the masks held fixed by the seed."""
    model, adapter = build(base, target_modules=SEVEN, dropout=0.3)
    packed = PackedModel(model, adapter, engine="fused").train()
    torch.manual_seed(5)
    _, gradients = learned(packed, adapter, batch)
    tensors = adapter.tensors()
    directions = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    slope = sum(float((gradients[name] * directions[name]).sum()) for name in tensors)

    def value(step: float) -> float:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.add_(directions[name], alpha=step)
            torch.manual_seed(5)
            with packed.routed(batch):
                logprobs = packed(batch).double()
            for name, tensor in tensors.items():
                tensor.sub_(directions[name], alpha=step)
        return float((logprobs * torch.linspace(1, 2, len(logprobs))).sum())

    step = 1e-4
    measured = (value(step) - value(-step)) / (2 * step)
    assert measured == pytest.approx(slope, rel=1e-3)


def test_four_bit_weights_equal_the_plain_layers(base: BaseModel, batch: PackedBatch) -> None:
    pytest.importorskip("bitsandbytes")
    model, adapter = build(base, quantization="nf4", dtype=torch.float32, target_modules=SEVEN)
    plain = learned(PackedModel(model, adapter, engine="plain"), adapter, batch)
    packed = PackedModel(model, adapter, engine="fused")
    fused = learned(packed, adapter, batch)
    assert_alike(fused, plain, 1e-4)
    for count in (1, len(packed.decoder.layers)):  # type: ignore[union-attr]
        packed.decoder.leave_expanded(count)  # type: ignore[union-attr]
        losses, gradients = learned(packed, adapter, batch)
        assert torch.equal(losses, fused[0])
        assert all(torch.equal(gradients[name], fused[1][name]) for name in gradients)


def test_asked_for_everywhere_equals_the_plain_layers(
    base: BaseModel, make_batch: MakeBatch
) -> None:
    everywhere = make_batch([17, 2, 40], [0, 1, 2], every=1)
    model, adapter = build(base, target_modules=SEVEN)
    plain = learned(PackedModel(model, adapter, engine="plain"), adapter, everywhere)
    fused = learned(PackedModel(model, adapter, engine="fused"), adapter, everywhere)
    assert_alike(fused, plain, CLOSE)


def test_the_model_keeps_its_parameters(base: BaseModel) -> None:
    model, adapter = build(base, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    PackedModel(model, adapter, engine="fused")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_unknown_architecture_takes_the_plain_layers(base: BaseModel) -> None:
    model, adapter = build(base)
    model.config.model_type = "stablelm"
    assert PackedModel(model, adapter).decoder is None
    with pytest.raises(UsageError, match="model type stablelm"):
        PackedModel(model, adapter, engine="fused")


def test_eight_bit_products_stay_near_and_say_how_near(base: BaseModel, batch: PackedBatch) -> None:
    model, adapter = build(base, dtype=torch.float32, target_modules=SEVEN)
    exact = learned(PackedModel(model, adapter, engine="fused"), adapter, batch)
    packed = PackedModel(model, adapter, engine="fused", base_compute="fp8")
    rounded = learned(packed, adapter, batch)
    found = packed.rounding(batch)
    difference = (rounded[0] - exact[0]).abs()
    assert 0 < found.mean < 0.3
    assert found.mean == pytest.approx(float(difference.mean()), rel=1e-3)
    assert found.largest == pytest.approx(float(difference.max()), rel=1e-3)
    assert found.exact_loss == pytest.approx(-float(exact[0].mean()), rel=1e-5)
    assert f"{found.mean:.4f} nats" in str(found)
    ours, theirs = (torch.cat([g.flatten() for g in x[1].values()]) for x in (rounded, exact))
    assert (ours - theirs).norm() / theirs.norm() < 0.3


def test_eight_bit_products_need_the_fused_engine(base: BaseModel) -> None:
    model, adapter = build(base, dtype=torch.float32)
    with pytest.raises(UsageError, match="needs the fused engine"):
        PackedModel(model, adapter, engine="plain", base_compute="fp8")


@pytest.mark.parametrize("targets", [FOUR, SEVEN])
@pytest.mark.parametrize("keep", [Keep(), Keep(False, False, False)], ids=["kept", "again"])
def test_eight_bit_products_need_no_exact_weights(
    base: BaseModel, batch: PackedBatch, targets: tuple[str, ...], keep: Keep
) -> None:
    model, adapter = build(base, dtype=torch.float32, target_modules=targets)
    packed = PackedModel(model, adapter, engine="fused", base_compute="fp8", keep=keep)
    before = learned(packed, adapter, batch)
    assert packed.let_go() is None
    after = learned(packed, adapter, batch)
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
    for name, parameter in model.named_parameters():
        if ".layers." in name and name.endswith("_proj.base_layer.weight"):
            assert parameter.untyped_storage().nbytes() == 4
            assert parameter.isnan().all()  # loud, where somebody asks
    with pytest.raises(AssertionError, match="were let go of"):
        packed.rounding(batch)


def test_weights_that_others_read_stay_beside_their_eight_bits(
    base: BaseModel, batch: PackedBatch
) -> None:
    model, adapter = build(base, dtype=torch.float32, target_modules=("q_proj",))
    layer = model.model.layers[1].mlp.down_proj
    model.another = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    model.another.weight = layer.weight
    packed = PackedModel(model, adapter, engine="fused", base_compute="fp8")
    before = learned(packed, adapter, batch)
    said = packed.let_go()
    assert said is not None and "model.layers.1.mlp.down_proj.weight and 1 more stay" in said
    assert layer.weight.isfinite().all()
    assert torch.equal(learned(packed, adapter, batch)[0], before[0])


def test_quantised_weights_stay_beside_their_eight_bits(
    base: BaseModel, batch: PackedBatch
) -> None:
    pytest.importorskip("bitsandbytes")
    model, adapter = build(base, quantization="nf4", target_modules=FOUR)
    packed = PackedModel(model, adapter, engine="fused", base_compute="fp8")
    before = learned(packed, adapter, batch)
    said = packed.let_go()
    assert said is not None and "model.layers.0.self_attn.q_proj.base_layer.weight and" in said
    assert packed.rounding(batch).mean > 0
    assert torch.equal(learned(packed, adapter, batch)[0], before[0])
