"""Adapters in a tower: by its own path, each picture the way of its example's task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.data.kept_features import why_not
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.load import adapt, load_model, load_tokenizer
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.trust import settle

from .conftest import some_at_once
from .test_packed import gradients_held_to_each_alone

# A tower's layers by their own paths, a pattern each.
TARGETS = {
    "llava": "*.vision_tower.*.q_proj",
    "llava_next": "*.vision_tower.*.fc1",
    "idefics3": "*.vision_model.*.v_proj",
    "internvl": "*.vision_tower.*.q_proj",
    "gemma3": "*.vision_tower.*.out_proj",
    "paligemma": "*.vision_tower.*.fc2",
    "qwen2_5_vl": "*.visual.*.qkv",
    "qwen3_vl": "*.visual.*.linear_fc2",  # those of its mergers, which take four neighbours together, among them
    "gemma4": "*.vision_tower.*.q_proj.linear",
}


@pytest.mark.parametrize("kind", some_at_once(TARGETS, "llava", "idefics3", "qwen3_vl"))
def test_gradients_are_those_of_each_example_alone(
    kind: str, llava: BaseModel, models: Callable[[str], BaseModel]
) -> None:
    base = llava if kind == "llava" else models(kind)
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    config = configure(rank=4, target_modules=["q_proj", TARGETS[kind]])
    torch.manual_seed(1)
    adapter = adapt(model, config, ("one", "two"))
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.add_(0.05 * torch.randn_like(tensor))
    vision = load_tokenizer(base).vision()
    packed = PackedModel(model, adapter, vision=vision).eval()
    settle(packed)
    assert packed.plain is None or packed.plain.way.layout == "packed"
    part = TARGETS[kind].split(".")[1]
    bare = [path for path in adapter.layers if path.endswith(".q_proj") and part not in path]
    tower = [path for path in adapter.layers if part in path]
    assert bare and tower
    first: Any = gradients_held_to_each_alone(packed)
    assert any(grad.abs().max() > 0 for name, grad in first.items() if part in name)
    reason = why_not(vision, adapter, model)
    assert reason is not None and "an adapter learns in the tower" in reason


def test_a_bare_name_is_the_language_part_s(llava: BaseModel) -> None:
    model = load_model(llava, dtype=torch.float32, device=torch.device("cpu"))
    adapter = adapt(model, configure(rank=4, target_modules=["q_proj"]), ("one",))
    assert adapter.layers and all("language_model" in path for path in adapter.layers)
