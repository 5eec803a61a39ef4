"""Modules of a tower that are named as unread are those that autograd finds no way to, in transformers' own model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from mtl_lora_cli.models.unread import unread_layers

PICTURE = 3
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
# Of each tower: its configuration, and tokens before those of the picture.
TOWERS = {
    "clip": ("CLIPVisionConfig", 1),
    "siglip": ("SiglipVisionConfig", 0),
    "aimv2": ("Aimv2VisionConfig", 0),
    "vit": ("ViTConfig", 1),
    "deit": ("DeiTConfig", 2),
    "dinov2": ("Dinov2Config", 1),
}


def llava(tower: str, layer: int) -> Any:
    """A tiny LLaVA around that tower, all of whose weights learn."""
    name, first = TOWERS[tower]
    text = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    config = transformers.LlavaConfig(
        vision_config=getattr(transformers, name)(**SIZES),
        text_config=text,
        image_token_index=PICTURE,
        vision_feature_layer=layer,
        vision_feature_select_strategy="default" if first else "full",
    )
    return transformers.LlavaForConditionalGeneration(config), 4 + max(first - 1, 0)


@pytest.mark.parametrize(
    ("tower", "layer"), [*((tower, -1) for tower in TOWERS), ("clip", -2), ("vit", -2)]
)
def test_what_is_unread_has_no_gradient(tower: str, layer: int) -> None:
    model, count = llava(tower, layer)
    ids = torch.tensor([[5, *[PICTURE] * count, 7, 8]])
    model(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8)).logits.square().sum().backward()
    inside = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and "vision_tower" in path
    }
    silent = [path for path, module in inside.items() if module.weight.grad is None]
    assert unread_layers(model, inside) == silent
    assert len(silent) < len(inside)
    assert bool(silent) == (layer == -2 or tower in ("siglip", "aimv2", "vit", "deit"))
