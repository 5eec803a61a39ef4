"""Any rank, and ranks that differ within a layer: sizes filled up with zeros change nothing but the speed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtl_lora_cli.adapters import frozen, stack_products
from mtl_lora_cli.engine.memory import sizes_of
from mtl_lora_cli.models.packed import PackedModel

from .double import adapt_all, in_double, tiny
from .test_families import CASES, CLOSE, furthest
from .test_rows import grow

CHANGES = {kind: changes for kind, variant, changes in CASES if not variant}


@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"rank_pattern": {"k_proj": 5, "v_proj": 9, "up_proj": 1}}),
        ("qwen3", {"rank_pattern": {"o_proj": 17, "q_proj": 8}}),
        ("glm4_moe", {"experts": "shared", "rank_pattern": {"experts.down_proj": 5}}),
        ("gpt_oss", {"experts": "each"}),
    ],
    ids=str,
)
def test_gradients_are_those_of_transformers_alone(
    kind: str, settings: dict[str, Any], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of parameters in their own sizes, in float64, with W_t in the place of each weight there."""
    for module in (frozen, stack_products):
        monkeypatch.setattr(module, "step_of", lambda like, dtype: step)
    assert furthest(tiny(kind, **CHANGES[kind]), **settings) < CLOSE


@pytest.mark.parametrize("step", [1, 8])
def test_rows_grow_as_in_transformers(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that are added one by one, with ranks that differ within q, k, v and within gate, up."""
    monkeypatch.setattr(frozen, "step_of", lambda like, dtype: step)
    model = tiny("llama")
    adapter = adapt_all(model, rank_pattern={"k_proj": 5, "v_proj": 9, "up_proj": 1})
    with torch.inference_mode(), in_double():
        grow(PackedModel(model, adapter, engine="fused").eval())


@pytest.mark.parametrize(("on_card", "rows", "columns"), [(True, 24, 40), (False, 17, 34)])
def test_memory_counts_what_is_filled_up(on_card: bool, rows: int, columns: int) -> None:
    """k and v of rank 3 beside q of rank 17, with two up-projections."""
    model = tiny("llama")
    adapter = adapt_all(model, rank_pattern={"q_proj": 17})
    sizes = sizes_of(model, adapter, value=2, on_card=on_card)
    qkv, o = sizes.layers[0].qkv, sizes.layers[0].o
    assert (qkv.rows, qkv.columns) == (3 * rows, 3 * columns)
    assert (o.rows, o.columns) == ((8, 8) if on_card else (3, 6))
    assert sizes.roomy(qkv) == sizes.roomy(o) == on_card
    assert sizes.trained == sum(tensor.numel() for tensor in adapter.trained().values())
