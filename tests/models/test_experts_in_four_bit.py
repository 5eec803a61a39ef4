"""Experts in NF4: as bitsandbytes rounds them, on both engines, and as few bytes as memory says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mtl_lora_cli.adapters.experts import STACKS, expert_modules
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.engine.memory import sizes_of, weight_bytes
from mtl_lora_cli.export.alone import load_alone
from mtl_lora_cli.models.base import BaseModel, find_base_model
from mtl_lora_cli.models.load import adapt, load_model, skeleton
from mtl_lora_cli.models.packed import Engine, PackedModel

from ..engine.double import alone, packed_row
from ..families.build import build
from ..families.models import MODELS

CPU = torch.device("cpu")
LENGTHS = (19, 7, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    (model,) = (one for one in MODELS if str(one) == "qwen3_moe")
    return find_base_model(str(build(model, tmp_path_factory.mktemp("base") / "moe")))


@pytest.fixture(scope="module")
def in_four_bit(base: BaseModel) -> Any:
    return load_model(base, dtype=torch.float32, device=CPU, quantization="nf4")


def stacks(model: Any) -> dict[str, Any]:
    found = expert_modules(dict(model.named_modules()))
    return {f"{path}.{name}": getattr(one, name) for path, one in found for name in STACKS}


@pytest.mark.parametrize("engine", ["fused", "plain"])
def test_they_are_rounded_as_bitsandbytes_rounds(
    base: BaseModel, in_four_bit: Any, engine: Engine
) -> None:
    generator = torch.Generator().manual_seed(0)
    some = [(torch.randint(3, 512, (n,), generator=generator), 0) for n in LENGTHS]
    rounded = load_alone(base.folder, torch.float32, quantization="nf4")
    packed = PackedModel(copy.deepcopy(in_four_bit), engine=engine).eval()
    batch = packed_row(some)
    with torch.no_grad():
        found, right = packed(batch), alone(rounded, {}, [(tokens, -1) for tokens, _ in some])
        whole = alone(load_alone(base.folder, torch.float32), {}, [(t, -1) for t, _ in some])
    torch.testing.assert_close(found, right, rtol=0, atol=3e-5)
    assert float((right - whole).abs().max()) > 0.1  # it is another model


def test_gradients_are_those_beside_rounded_weights(base: BaseModel, in_four_bit: Any) -> None:
    """An adapter of each expert on NF4, beside the same on weights that were rounded and expanded."""
    config = configure(rank=2, up_projections=2, experts="each")
    generator = torch.Generator().manual_seed(0)
    some = [(torch.randint(3, 512, (n,), generator=generator), t) for t, n in enumerate(LENGTHS)]
    found = []
    rounded = load_alone(base.folder, torch.float32, quantization="nf4")
    for model in (copy.deepcopy(in_four_bit), rounded):
        torch.manual_seed(1)
        adapter = adapt(model, config, ["a", "b", "c"])
        with torch.no_grad():
            for tensor in adapter.tensors().values():
                tensor.add_(0.1 * torch.randn_like(tensor))
        packed = PackedModel(model, adapter, engine="fused").train()
        batch = packed_row(some)
        with packed.routed(batch):
            packed(batch).sum().backward()
        found.append({name: tensor.grad for name, tensor in adapter.tensors().items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-4)


def test_memory_counts_them_as_they_are(base: BaseModel, in_four_bit: Any) -> None:
    with torch.device("meta"):
        empty = skeleton(base)
        adapter = adapt(empty, configure(rank=2), ["a"])
    sizes = sizes_of(empty, adapter, value=4, on_card=False, quantization="nf4")
    whole = sizes_of(empty, adapter, value=4, on_card=False)
    there = sum(weight.numel() for weight in stacks(in_four_bit).values())
    experts = sum(layer.experts for layer in sizes.layers)
    assert there == experts // 2  # two values a byte
    saved = weight_bytes(whole) - weight_bytes(sizes)
    layers = sum(g.weights for layer in sizes.layers for g in layer.groups) + experts
    assert saved == pytest.approx(layers * (4 - 4.127 / 8), abs=2)
