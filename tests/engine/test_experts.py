"""Adapters on experts, on both engines, against transformers with W_t in the place of each stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.engine.saved import Keep
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model
from mtl_lora_cli.models.packed import Engine, PackedModel

from .double import adapt_all, linear_layers, tiny
from .peaks import peaks
from .test_bytes import longer
from .test_families import CASES, CLOSE, furthest
from .test_families_rounded import WHOLE_BLOCKS, learned

KINDS = {f"{kind} {variant}".strip(): (kind, changes) for kind, variant, changes in CASES}
AGAIN = Keep(gate_up=False)
LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("name", "experts", "engine", "keep"),
    [
        ("mixtral window", "each", "fused", AGAIN),
        pytest.param("qwen2_moe some dense", "shared", "fused", None, marks=LONG),
        ("gpt_oss", "shared", "plain", None),
        pytest.param("gpt_oss", "each", "fused", None, marks=LONG),
        pytest.param("glm4_moe", "each", "plain", None, marks=LONG),
        ("glm4_moe", "shared", "fused", AGAIN),
    ],
)
def test_experts_are_transformers_alone(
    name: str, experts: str, engine: Engine, keep: Keep | None
) -> None:
    kind, changes = KINDS[name]
    model: Any = tiny(kind, **changes)
    assert furthest(model, keep, engine, experts=experts) < CLOSE


@pytest.mark.parametrize(
    ("name", "experts", "recompute"),
    [
        ("gpt_oss", "each", False),
        pytest.param("glm4_moe", "shared", True, marks=LONG),
        pytest.param("mixtral window", "each", True, marks=LONG),
    ],
)
def test_predicted_is_measured(name: str, experts: str, recompute: bool) -> None:
    kind, changes = KINDS[name]
    model = tiny(kind, **longer(changes)).float()
    adapter = adapt_all(model, experts=experts)
    for tensor in adapter.tensors().values():
        tensor.data = tensor.data.float()
    estimate, measured = peaks(model, adapter, recompute)
    assert estimate == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("experts", ["shared", "each"])
def test_a_gate_that_reads_the_token_is_not_fused(experts: str) -> None:
    """The fused block would show it an activation that is weighed already."""
    model = tiny("qwen3_moe", **KINDS["qwen3_moe some dense"][1])
    config = configure("hydralora", experts=experts, target_modules=["q_proj"])
    packed = PackedModel(model, inject(model, config, ["one"]))
    assert packed.decoder is None
    assert "whose gate reads the token" in str(packed.not_fused)


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        "mixtral window",
        "qwen2_moe some dense",
        "qwen3_moe some dense",
        "olmoe",
        "glm4_moe",
        "gpt_oss",
    ],
)
def test_mixtures_on_four_bit_weights(name: str, tmp_path: Path) -> None:
    """Beside transformers with what bitsandbytes itself expands, of linear layers and of experts."""
    functional = pytest.importorskip("bitsandbytes").functional
    kind, changes = KINDS[name]
    sides = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    bare: Any = tiny(kind, **{**changes, **WHOLE_BLOCKS, **sides}).float()
    bare.save_pretrained(tmp_path)
    base = find_base_model(str(tmp_path))
    model: Any = load_model(
        base, dtype=torch.float32, device=torch.device("cpu"), quantization="nf4"
    )
    rounded = 0
    for path, weight in model.named_parameters():
        state = getattr(weight, "quant_state", None)
        if state is not None:
            exact = bare.get_parameter(path)
            whole = functional.dequantize_4bit(weight.data, state).float()
            rounded += int(not torch.equal(whole, exact))
            exact.data = whole
    stacks = 2 * sum(path.endswith("experts.down_proj") for path, _ in model.named_parameters())
    assert rounded == len(linear_layers(bare)) + stacks > stacks > 0
    adapter = adapt_all(model, bare=bare, dtype=torch.float32)
    packed = PackedModel(model, adapter, engine="fused").train()
    assert max(learned(bare, packed, adapter)) < 1e-4
