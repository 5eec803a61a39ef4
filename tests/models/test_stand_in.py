"""The small model of the self-test has each sort of layer that a published size has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from mtl_lora_cli.engine.families import plan_of
from mtl_lora_cli.engine.plan import LayerPlan, MixerPlan
from mtl_lora_cli.models.load import auto_class
from mtl_lora_cli.models.stand_in import MOST_WEIGHTS, small_config

LARGE = {
    "gemma3_text": {},
    "glm4_moe": {"first_k_dense_replace": 3},
    "olmo3": {},
    "qwen3_5_text": {},
    "qwen3_next": {},
    "qwen3_vl": {},
    "smollm3": {},  # says in a list of numbers which layers turn nothing
}


def sort_of(layer: LayerPlan) -> tuple[Any, ...]:
    first = layer.attention
    if isinstance(first, MixerPlan):
        return (first.module, type(layer.mlp))
    return (first.window is None, first.rotary, type(layer.mlp))


@pytest.mark.parametrize("model_type", LARGE)
def test_no_sort_of_layer_is_left_out_and_none_is_large(model_type: str) -> None:
    real = CONFIG_MAPPING[model_type](**LARGE[model_type])
    small, _ = small_config(real)
    wanted, found = ({sort_of(layer) for layer in plan_of(one).layers} for one in (real, small))
    assert wanted == found
    auto: Any = auto_class(real)
    with torch.device("meta"):
        model = auto.from_config(small)
    assert sum(one.numel() for one in model.parameters()) < MOST_WEIGHTS / 4


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_layers_that_take_others_keys_have_whose(model_type: str) -> None:
    real = CONFIG_MAPPING[model_type](num_kv_shared_layers=12)
    small, _ = small_config(real)
    own = small.num_hidden_layers - small.num_kv_shared_layers
    assert small.num_kv_shared_layers > 0
    assert {*small.layer_types[:own]} == {*small.layer_types[own:]} == {*real.layer_types}
    auto: Any = auto_class(real)
    with torch.device("meta"):
        assert auto.from_config(small)
