"""What `vision_speed.py` measures: shapes of models with random weights, and packed rows of noise for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mtl_lora_cli.bench.random_model import _four_bit, _replace, layer_linears
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.models import registered
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.sight import with_pictures
from mtl_lora_cli.models.vision import Seen, Vision, vision_class

TASKS = 4
PICTURE = 31_999  # the token of pictures in all shapes


@dataclass(frozen=True)
class Shape:
    """A model's configuration, and what its tower takes of one picture."""

    config: Any
    seen: Seen
    count: int


def llama(
    width: int, inner: int, layers: int, heads: int, groups: int, words: int, tied: bool
) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=words, max_position_embeddings=8192, tie_word_embeddings=tied,
        pad_token_id=0,
    )  # fmt: skip


def shape_of(name: str) -> Shape:
    """The shape of that name; `tiny` ones are for trying this file out."""
    import transformers as t

    small = name.startswith("tiny-")
    if name in ("alias", "tiny-alias"):
        side = 28 if small else 224
        tower = t.Dinov2Config(
            hidden_size=384, num_hidden_layers=2 if small else 12, num_attention_heads=6,
            mlp_ratio=4, patch_size=14, image_size=side,
        )  # fmt: skip
        text = llama(576, 1536, 2 if small else 30, 9, 3, 49_152, True)
        return _llava(tower, text, side, -1)
    if name in ("llava-7b", "tiny-llava"):
        side = 56 if small else 336
        tower = t.CLIPVisionConfig(
            hidden_size=64 if small else 1024, intermediate_size=128 if small else 4096,
            num_hidden_layers=2 if small else 24, num_attention_heads=2 if small else 16,
            image_size=side, patch_size=14,
        )  # fmt: skip
        text = llama(*((128, 256, 2, 4, 4) if small else (4096, 11008, 32, 32, 32)), 32_064, False)
        return _llava(tower, text, side, -2)
    assert name in ("qwen3-vl-8b", "tiny-qwen"), name
    sizes = (64, 2, 128, 2, [0]) if small else (1152, 27, 4304, 16, [8, 16, 24])
    width, depth, inner, heads, deep = sizes
    text = {
        "hidden_size": 128 if small else 4096,
        "intermediate_size": 256 if small else 12288,
        "num_hidden_layers": 2 if small else 36,
        "num_attention_heads": 4 if small else 32,
        "num_key_value_heads": 2 if small else 8,
        "head_dim": 32 if small else 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [6, 5, 5] if small else [24, 20, 20],
            "mrope_interleaved": True,
        },
    }
    tower = {
        "depth": depth, "hidden_size": width, "intermediate_size": inner, "num_heads": heads,
        "patch_size": 16, "spatial_merge_size": 2, "out_hidden_size": text["hidden_size"],
        "deepstack_visual_indexes": deep, "num_position_embeddings": 2304,
    }  # fmt: skip
    config = t.Qwen3VLConfig(vision_config=tower, text_config=text, image_token_id=PICTURE)
    high, wide = (4, 8) if small else (40, 30)
    seen = {
        "pixel_values": torch.randn(high * wide, 3 * 2 * 16 * 16),
        "image_grid_thw": torch.tensor([[1, high, wide]]),
    }
    return Shape(config, seen, high * wide // 4)


def _llava(tower: Any, text: Any, side: int, layer: int) -> Shape:
    from transformers import LlavaConfig

    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=PICTURE, vision_feature_layer=layer
    )
    return Shape(config, {"pixel_values": torch.randn(1, 3, side, side)}, (side // 14) ** 2)


def built(
    shape: Shape, device: torch.device, dtype: torch.dtype, quantization: str, cut: bool
) -> Any:
    """The model with random weights, frozen; the language part in 4 bits where that is asked for."""
    from transformers import AutoModelForImageTextToText

    registered.register()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(shape.config, dtype=dtype)
    if quantization == "nf4":
        four_bit = {id(module) for module in layer_linears(model)}
        for path, module in list(model.named_modules()):
            if id(module) in four_bit:
                storage = dtype if cut else torch.uint8
                _replace(model, path, _four_bit(module, dtype, device, storage))
    return model.requires_grad_(False).eval()


def vision_of(config: Any) -> Vision:
    """How pictures are laid into rows, without a processor: they are noise already."""
    kind = vision_class(config)
    assert kind is not None
    vision = object.__new__(kind)
    vision.config, vision.token_id = config, PICTURE
    return vision


_drawn: dict[tuple[Any, ...], list[PackedBatch]] = {}


def rows_of(name: str, shape: Shape, row_length: int, rows: int, steps: int) -> list[PackedBatch]:
    """`drawn_rows`, once for all cases of a shape."""
    key = (name, row_length, rows, steps)
    if key not in _drawn:
        _drawn[key] = drawn_rows(shape, row_length, rows, steps)
    return _drawn[key]


def drawn_rows(shape: Shape, row_length: int, rows: int, steps: int) -> list[PackedBatch]:
    """Of each step one pass: examples of a picture and 20 to 120 words, 4 to 60 of them an answer."""
    draw = np.random.default_rng(0)
    vision, batches = vision_of(shape.config), []
    for step in range(steps):
        parts, prompts, tasks = [], [], []
        for _ in range(rows):
            room = row_length
            while True:
                before, behind, answer = (
                    int(draw.integers(*b)) for b in ((4, 40), (12, 60), (4, 60))
                )
                length = before + shape.count + behind + answer
                if length > room:
                    break
                room -= length
                words = draw.integers(3, 31_000, length)
                words[before : before + shape.count] = PICTURE
                parts.append(words)
                prompts.append(length - answer)
                tasks.append(len(tasks) % TASKS)
        lengths = [len(part) - 1 for part in parts]  # nothing is asked of the last one
        ends = np.cumsum([0, *lengths])
        asked = [np.arange(start + prompt - 1, start + length)
                 for start, prompt, length in zip(ends, prompts, lengths, strict=False)]  # fmt: skip
        flat = torch.from_numpy(np.concatenate([part[:-1] for part in parts]))
        targets = np.concatenate(
            [part[prompt:] for part, prompt in zip(parts, prompts, strict=True)]
        )
        positions = torch.from_numpy(np.concatenate(asked))
        batch = PackedBatch(
            input_ids=flat[None],
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            task_ids=torch.from_numpy(np.repeat(tasks, lengths))[None],
            segments=Segments.build(lengths),
            positions=positions,
            owner=torch.arange(len(positions)),
            targets=torch.from_numpy(targets),
        )
        generator = torch.Generator().manual_seed(step)
        seen = [
            {
                n: v if not v.is_floating_point() else torch.randn(v.shape, generator=generator)
                for n, v in shape.seen.items()
            }
            for _ in parts
        ]
        batches.append(with_pictures(batch, vision, seen, [shape.count] * len(parts), prompts))
    return batches


def tokens_of(batch: PackedBatch) -> int:
    return batch.input_ids.shape[1] + len(batch.segments.bounds)
