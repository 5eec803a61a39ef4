"""A folder with the names that microsoft/swin-tiny-patch4-window7-224 has on the hub: loaded, trained on, studied."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mtl_lora_cli.dense.backbones import load_backbone
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.resources import bundled

from ..forks import Forks

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WIDTH, DEPTHS, HEADS, WINDOW = 8, (2, 2, 6, 2), (1, 1, 2, 2), 7
# The hub's names, where they differ from those of the model in memory.
ON_THE_HUB = (
    (r"attention\.(query|key|value)", r"attention.self.\1"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
    (r"attention\.relative_position_bias\.", "attention.self."),
)


def of_a_block(path: str, width: int, heads: int) -> dict[str, tuple[int, ...]]:
    square = {f"attention.self.{n}": (width, width) for n in ("query", "key", "value")}
    layers = square | {
        "attention.output.dense": (width, width),
        "intermediate.dense": (4 * width, width),
        "output.dense": (width, 4 * width),
        "layernorm_before": (width,),
        "layernorm_after": (width,),
    }
    table = {f"{path}.attention.self.relative_position_bias_table": ((2 * WINDOW - 1) ** 2, heads)}
    weights = {f"{path}.{name}.weight": shape for name, shape in layers.items()}
    return table | weights | {f"{path}.{name}.bias": shape[:1] for name, shape in layers.items()}


def shapes() -> dict[str, tuple[int, ...]]:
    """Name on the hub → shape."""
    found: dict[str, tuple[int, ...]] = {
        "swin.embeddings.patch_embeddings.projection.weight": (WIDTH, 3, 4, 4),
        "swin.embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "swin.embeddings.norm.weight": (WIDTH,),
        "swin.embeddings.norm.bias": (WIDTH,),
        "swin.layernorm.weight": (8 * WIDTH,),
        "swin.layernorm.bias": (8 * WIDTH,),
        "classifier.weight": (1000, 8 * WIDTH),
        "classifier.bias": (1000,),
    }
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        layer, width = f"swin.encoder.layers.{stage}", WIDTH * 2**stage
        for block in range(depth):
            found |= of_a_block(f"{layer}.blocks.{block}", width, heads)
        if stage < 3:
            found[f"{layer}.downsample.reduction.weight"] = (2 * width, 4 * width)
            for side in ("weight", "bias"):
                found[f"{layer}.downsample.norm.{side}"] = (4 * width,)
    return found


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "swin-tiny-patch4-window7-224"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    weights = {n: 0.1 * torch.randn(s, generator=generator) for n, s in shapes().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["SwinForImageClassification"],
        "attention_probs_dropout_prob": 0.0,
        "depths": DEPTHS,
        "drop_path_rate": 0.1,
        "embed_dim": WIDTH,
        "encoder_stride": 32,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": 8 * WIDTH,
        "id2label": {str(number): f"label {number}" for number in range(1000)},
        "image_size": 224,
        "initializer_range": 0.02,
        "label2id": {f"label {number}": number for number in range(1000)},
        "layer_norm_eps": 1e-05,
        "mlp_ratio": 4.0,
        "model_type": "swin",
        "num_channels": 3,
        "num_heads": HEADS,
        "num_layers": 4,
        "patch_size": 4,
        "path_norm": True,
        "qkv_bias": True,
        "torch_dtype": "float32",
        "transformers_version": "4.13.0.dev0",
        "use_absolute_embeddings": False,
        "window_size": WINDOW,
    }
    (folder / "config.json").write_text(json.dumps(config))
    preprocessor = {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": 224,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Swin Transformer (tiny)\n")
    return folder


def on_the_hub(name: str) -> str:
    name = re.sub(r"attention\.([qkv])_proj", lambda m: f"attention.{LONG[m[1]]}", name)
    for own, theirs in ON_THE_HUB:
        name = re.sub(own, theirs, name)
    return f"swin.{name}"


LONG = {"q": "query", "k": "key", "v": "value"}


def test_every_weight_is_the_hubs(hub: Path) -> None:
    model = load_backbone(
        find_base_model(str(hub)), size=(168, 224), dtype=torch.float32, device=torch.device("cpu")
    )
    stored, own = load_file(hub / "model.safetensors"), dict(model.named_parameters())
    assert {on_the_hub(name) for name in own} == {n for n in stored if not n.startswith("class")}
    assert all(torch.equal(value, stored[on_the_hub(name)]) for name, value in own.items())


def rooms(folder: Path, count: int) -> None:
    """A miniature of NYU Depth V2 in the coding that the recipe `nyuv2` reads."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        lines = []
        for number in range(count):
            row = {key: f"{split}-{number}-{key}.png" for key in ("image", "seg", "depth")}
            pixels = generator.integers(0, 256, (168, 224, 3), dtype=np.uint8)
            across = np.linspace(60, 200, 224, dtype=np.uint8)[None].repeat(168, 0)
            for key, values in (("image", pixels), ("seg", pixels[..., 0] % 39), ("depth", across)):
                Image.fromarray(values).save(folder / row[key])
            lines.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))


@pytest.mark.slow
def test_the_recipe_of_rooms_takes_it(hub: Path, forks: Forks, tmp_path: Path) -> None:
    rooms(tmp_path / "data" / "nyuv2", 2)
    shutil.copy(bundled("recipes") / "nyuv2.yaml", tmp_path)
    changes = ["training.max_steps=1", "training.rows_per_step=2", "training.rows_per_pass=2"]
    ended = forks.run(
        "train", "nyuv2.yaml", f"base_model={hub}", "run.name=one", "images.size=[56,84]", *changes,
        cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    learned = load_file(tmp_path / "runs" / "one" / "adapter" / "mtl_lora.safetensors")
    own = [name for name in learned if name.endswith("task_lora_B")]
    assert len(own) == 4 * 6, "six layers of the last block of each of four stages"
    assert all(bool(learned[name].any()) for name in own)


@pytest.mark.long
def test_the_study_takes_it(hub: Path, tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.mkdir()
    generator = np.random.default_rng(0)
    shape = (6, 168, 224)
    np.save(maps / "pixels.npy", generator.integers(0, 256, (*shape, 3), dtype=np.uint8))
    np.save(maps / "seg.npy", generator.integers(0, 39, shape, dtype=np.uint8))
    np.save(maps / "depth.npy", generator.uniform(0.7, 10, shape).astype(np.float32))
    upright = np.zeros((6, 3, 168, 224), np.float16)
    upright[:, 2] = 1
    np.save(maps / "normals.npy", upright)
    np.save(maps / "train.npy", np.arange(6) < 4)
    arms = [
        "frozen",
        "multi full",
        "task only",
        "authors' form",
        "single LoRA",
        "single LoRA, split",
    ]
    command = [sys.executable, BENCHMARKS / "dense_study.py", "--encoder", hub, "--maps", maps]
    command += ["--out", tmp_path / "out", "--steps", "1", "--batch", "1", "--seeds", "1"]
    ended = subprocess.run(
        [*map(str, command), "--without", "edges", *arms], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "out" / "dense_study.json").read_text())
    by_arm = {row["arm"]: row for row in found["three"]}
    assert set(by_arm) == {"shared LoRA", "both", "single full", "linear probe"}
    each = by_arm["both"]["encoder_values"] / by_arm["shared LoRA"]["encoder_values"]
    assert abs(each - 1) < 0.005
