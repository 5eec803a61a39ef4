"""Backbones of random weights, one of each family, small."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.data.map_batch import MapBatch
from mtl_lora_cli.dense.backbones import family_of, load_backbone
from mtl_lora_cli.dense.host import DenseHost
from mtl_lora_cli.dense.objective import LEARNING
from mtl_lora_cli.models.base import BaseModel, find_base_model
from mtl_lora_cli.tasks.maps import MapSpec

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

SPECS = {
    "classes": MapSpec("segmentation", 5, tuple("abcde")),
    "depth": MapSpec("depth", 1, low=0.5, high=9.0, scale="log"),
    "normals": MapSpec("normals", 3),
}


def host_of(
    base: BaseModel,
    kind: str,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> DenseHost:
    """As if trained: nothing stands where it began."""
    given = {"method": "mtlora", "task_rank": 2, "streams": "stages", **settings}
    if given["method"] == "lora":
        given = {k: v for k, v in given.items() if k not in ("task_rank", "streams")}
    given = {"target_modules": TARGETS[kind], "whole_modules": WHOLE[kind], **given}
    config = configure(rank=4, alpha=8.0, **given)
    trunk = load_backbone(base, size=size, dtype=dtype, device=torch.device("cpu"))
    family = family_of(base, trunk.config)
    own = family.stages(trunk.config).blocks if config.streams else None
    torch.manual_seed(1)
    adapter = inject(trunk, config, list(SPECS), within=LEARNING, own_in=own)
    host = DenseHost(trunk, family, adapter, list(SPECS.values()), dtype)
    for name, tensor in adapter.tensors().items():
        if "lora_B" in name or name.startswith("whole:"):
            tensor.data += 0.05 * torch.randn_like(tensor)
    return host


def batch_of(size: tuple[int, int], dtype: torch.dtype = torch.float64, count: int = 2) -> MapBatch:
    """Pictures with every map."""
    generator = torch.Generator().manual_seed(5)
    draw = partial(torch.randn, generator=generator, dtype=dtype)
    normals = torch.nn.functional.normalize(draw(count, 3, *size), dim=1)
    targets = {
        0: torch.randint(-1, 5, (count, *size), generator=generator),
        1: 0.5 + draw(count, *size).abs(),
        2: normals,
    }
    targets[0][targets[0] < 0] = -100
    targets[1][0, :3] = float("nan")
    return MapBatch(
        draw(count, 3, *size),
        targets,
        torch.ones(count, 3, dtype=torch.bool),
        torch.arange(3).repeat(count),
        torch.arange(3),
    )
