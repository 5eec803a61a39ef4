"""Adapters on experts, on both engines, against transformers with W_t in the place of each stack."""

from __future__ import annotations

from typing import Any

import pytest

from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.engine.saved import Keep
from mtl_lora_cli.models.packed import Engine, PackedModel

from .double import adapt_all, tiny
from .peaks import peaks
from .test_bytes import longer
from .test_families import CASES, CLOSE, furthest

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
