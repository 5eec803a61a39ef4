"""The self-test in 16 bits: a plan that leaves something out is not followed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.trust import settle

from .. import wrong_plans as wrong
from .double import tiny
from .test_families import GEMMA4, MIXED

SCALES: dict[str, Any] = {
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.8,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
}


@pytest.mark.parametrize(
    ("model_type", "changes", "change", "dtype"),
    [
        ("qwen3", {}, wrong.NO_HEAD_NORMS, torch.bfloat16),
        ("qwen3", {}, wrong.NO_HEAD_NORMS, torch.float16),
        ("llama", {}, wrong.neighbours, torch.bfloat16),
        ("glm4", {}, wrong.neighbours, torch.float16),
        ("granite", SCALES, wrong.NO_MULTIPLIER, torch.bfloat16),
        ("gemma2", {"attn_logit_softcapping": 3.0, **MIXED}, wrong.NO_CAP, torch.bfloat16),
        ("gemma3_text", MIXED, wrong.NO_WINDOW, torch.bfloat16),
        ("gemma4_text", GEMMA4, wrong.no_scale, torch.bfloat16),
    ],
)
def test_in_16_bits_a_wrong_plan_falls_to_the_plain_engine(
    model_type: str,
    changes: dict[str, Any],
    change: wrong.Change,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong.planned_wrongly(monkeypatch, change)
    packed = PackedModel(tiny(model_type, **changes).to(dtype)).eval()
    assert packed.decoder is not None
    found = settle(packed)
    assert found.way is not None and found.unasked == ""
    assert "differ by" in str(packed.not_fused)
