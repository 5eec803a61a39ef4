"""What a tower takes, beside the same passes run without numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtl_lora_cli.memory.maps import _attention_of_cards, _Live
from mtl_lora_cli.memory.pictures import sizes_at_sight
from mtl_lora_cli.models.vision import features

WIDE = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "patch_size": 14,
    "num_attention_heads": 4,
    "image_size": 112,
}
COUNT = 64  # tokens of a picture


def model_of(kind: str) -> Any:
    """On the meta device."""
    import transformers as t

    tower = t.CLIPVisionConfig(**WIDE) if kind == "llava" else t.SiglipVisionConfig(**WIDE)
    sides = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 24}
    text: Any = {"vocab_size": 512, "num_attention_heads": 4, "pad_token_id": 0, **sides}
    if kind == "llava":
        language = t.LlamaConfig(**text)
        config = t.LlavaConfig(vision_config=tower, text_config=language, image_token_index=500)
    else:
        language = t.GemmaConfig(**text, num_key_value_heads=4)
        config = t.PaliGemmaConfig(
            vision_config=tower, text_config=language, image_token_index=500, projection_dim=96
        )
    with torch.device("meta"):
        return t.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)


def taken(model: Any, pictures: int) -> int:
    """The most bytes that a pass of the tower makes; views of weights are counted, too."""
    pixels = torch.zeros(pictures, 3, 112, 112, device="meta")
    with torch.no_grad(), _attention_of_cards(), _Live() as live:
        found = features(model, {"pixel_values": pixels}, torch.bfloat16)
    assert len(found.tokens) == pictures * COUNT
    return live.most + pixels.nbytes


@pytest.mark.parametrize("kind", ["llava", "paligemma"])
def test_a_frozen_tower_takes_what_is_said(kind: str) -> None:
    model = model_of(kind)
    sizes = sizes_at_sight(model, {"pixel_values": torch.zeros(1, 3, 112, 112)}, COUNT, 2)
    each = (taken(model, 24) - taken(model, 8)) / 16
    assert 0.95 <= COUNT * (sizes.held + sizes.working) / each <= 1.4
    named = dict(model.named_parameters())
    assert sizes.frozen == sum(p.numel() for n, p in named.items() if "language_model" not in n
                               and "lm_head" not in n)  # fmt: skip


def test_kept_features_take_no_pixels_and_nothing_works() -> None:
    sizes = sizes_at_sight(model_of("llava"), {}, COUNT, 2)
    assert (sizes.held, sizes.working) == (96 * 2, 0)
