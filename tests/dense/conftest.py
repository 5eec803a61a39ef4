"""Backbones of random weights, one of each family, small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_lora_cli.models.base import BaseModel, find_base_model

Backbones = Callable[[str], BaseModel]


def _configuration(kind: str) -> Any:
    import transformers as t

    if kind in ("swin", "swinv2"):
        made = t.SwinConfig if kind == "swin" else t.Swinv2Config
        return made(
            image_size=64,
            patch_size=4,
            embed_dim=16,
            depths=[1, 2, 2, 1],
            num_heads=[1, 2, 2, 4],
            window_size=4,
        )
    if kind == "hiera":
        return t.HieraConfig(
            image_size=[64, 64], embed_dim=16, depths=[1, 2, 2, 1], num_heads=[1, 1, 2, 2]
        )
    if kind == "convnext":
        return t.ConvNextConfig(hidden_sizes=[12, 16, 20, 24], depths=[1, 1, 2, 1])
    assert kind == "dinov2", kind
    return t.Dinov2Config(
        hidden_size=32, num_hidden_layers=5, num_attention_heads=2, patch_size=8, image_size=64
    )


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Backbones:
    """Kind → its folder, as `AutoModel` writes it, of weights that are all other than those of a fresh one."""
    from transformers import AutoModel

    folder = tmp_path_factory.mktemp("backbones")

    def made(kind: str) -> BaseModel:
        place = folder / kind
        if not place.is_dir():
            torch.manual_seed(7)
            model = AutoModel.from_config(_configuration(kind))
            for tensor in model.parameters():
                tensor.data += 0.05 * torch.randn_like(tensor)
            model.save_pretrained(place)
        return find_base_model(str(place))

    return made


TARGETS = {
    "swin": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
    "swinv2": ["query", "key", "value", "dense"],
    "hiera": ["qkv", "attn.proj", "fc1", "fc2"],
    "convnext": ["pwconv1", "pwconv2"],
    "dinov2": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
}
WHOLE = {
    "swin": ["*norm*", "*downsample.reduction", "*patch_embeddings*"],
    "swinv2": ["*norm*", "*downsample.reduction", "*patch_embeddings*"],
    "hiera": ["*norm*", "*patch_embeddings*"],
    "convnext": ["*norm*", "*downsampling_layer*", "*dwconv"],
    "dinov2": ["*norm*", "*patch_embeddings*"],
}


def folder_of(base: BaseModel) -> Path:
    return base.folder
