"""Adapters on experts in bfloat16: no further from float64 than transformers is, once both ask the same experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mtl_lora_cli.models.packed import PackedModel

from .double import adapt_all, tiny
from .replayed import distances
from .test_families import CASES

KINDS = {f"{kind} {variant}".strip(): (kind, changes) for kind, variant, changes in CASES}
LONG = pytest.mark.long
CLOSE = {"gpt_oss": 0.15}  # whose activation is steep: transformers itself is 0.08 off


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("mixtral window", "shared"),
        pytest.param("mixtral window", "each", marks=LONG),
        pytest.param("qwen3_moe some dense", "shared", marks=LONG),
        ("qwen3_moe some dense", "each"),
        pytest.param("olmoe", "each", marks=LONG),
        pytest.param("gpt_oss", "shared", marks=LONG),
        ("gpt_oss", "each"),
    ],
)
def test_what_differs_is_rounding_and_who_is_asked(name: str, experts: str) -> None:
    kind, changes = KINDS[name]
    model: Any = tiny(kind, **changes).to(torch.bfloat16)
    bare = copy.deepcopy(model)
    adapter = adapt_all(model, experts=experts, dtype=torch.float32)
    packed = PackedModel(model, adapter, engine="fused").train()
    found = distances(packed, adapter.tensors(), bare)
    assert found.replayed < 1.5 * found.theirs
    assert found.replayed < CLOSE.get(name, 0.05)
    if (name, experts) == ("mixtral window", "shared"):  # positions that ask others here
        assert found.own > 3 * found.replayed
