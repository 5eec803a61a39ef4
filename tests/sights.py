"""Small models that read pictures, of random weights, as transformers writes them; and rows with pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220)}

# Templates of the rows that `write_squares` writes: two that show pictures, one of text alone.
COLOUR = {
    "description": "Which colour?",
    "images": ["image"],
    "prompt": "<image> The colour is",
    "choices": {name: name for name in COLOURS},
    "label": "colour",
}
CAPTION = {
    "description": "What is there?",
    "images": ["image"],
    "prompt": "Say what is there:",
    "answer": "{{ caption }}",
}
SIDE = {
    "description": "Text alone.",
    "prompt": "{{ caption }} The side is",
    "choices": {"left": "left", "right": "right"},
    "label": "side",
}


def _vision_config() -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )


def tiny_granite(language: Path, folder: Path) -> Path:
    """A LLaVA whose language part scales its embeddings, those of pictures among them."""
    from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = _language("granite", len(tokenizer), embedding_multiplier=3.0, residual_multiplier=0.5)
    torch.manual_seed(3)
    config = LlavaConfig(
        vision_config=_vision_config(), text_config=text, image_token_index=len(tokenizer) - 1
    )
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _square().save_pretrained(folder)
    return folder


def _square() -> Any:
    from transformers import CLIPImageProcessorPil

    sides = {"height": 32, "width": 32}
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=sides)


def tiny_llava(language: Path, folder: Path) -> Path:
    """A LLaVA whose language part is a small trained model; 16 tokens a picture."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=_vision_config(),
            text_config=text.config,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=16,
            tie_word_embeddings=text.config.tie_word_embeddings,
        )
    )
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    for name, tensor in model.named_parameters():
        if "vision_tower" in name or "projector" in name:
            tensor.data += 0.05 * torch.randn_like(tensor)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _square().save_pretrained(folder)
    return folder


def write_squares(folder: Path, counts: dict[str, int]) -> Path:
    """Rows of pictures of one colour with a bright square in one half: `image`, `colour`, `side`, `caption`."""
    for number, (split, count) in enumerate(counts.items()):
        draw = np.random.default_rng(number)
        rows = []
        for index in range(count):
            colour = list(COLOURS)[int(draw.integers(3))]
            side = ["left", "right"][int(draw.integers(2))]
            height, width = (int(n) for n in draw.integers(28, 60, 2))
            pixels = np.zeros((height, width, 3), np.uint8)
            half = slice(0, width // 2) if side == "left" else slice(width // 2, None)
            pixels[:, half] = COLOURS[colour]
            pixels += draw.integers(0, 20, pixels.shape, dtype=np.uint8)
            name = f"{split}-{index}.png"
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / "pictures" / name)
            rows.append(
                {
                    "image": f"pictures/{name}",
                    "colour": colour,
                    "side": side,
                    "caption": f"a {colour} half on the {side}",
                }
            )
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


TOKENS = {
    "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>"]
    + [f"<row_{row}_col_{column}>" for row in (1, 2, 3, 4) for column in (1, 2, 3, 4)],
    "internvl": ["<IMG_CONTEXT>", "<img>", "</img>"],
    "gemma3": ["<image_soft_token>", "<start_of_image>", "<end_of_image>"],
    "qwen2_5_vl": ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"],
    "qwen3_vl": ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"],
}
TOKENS["smolvlm"] = TOKENS["idefics3"]
TOKENS |= {"llava_next": ["<image>"], "paligemma": ["<image>"]}
TOKENS |= {
    key: ["<|image|>", "<|boi|>", "<|eoi|>", "<|video|>", "<|audio|>"]
    for key in ("gemma4", "gemma4_small")
}


def tiny_model(kind: str, language: Path, folder: Path) -> Path:
    """A model of one of `TOKENS`, of random weights; its tokenizer is that of a small language model."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS[kind]})
    ids = [tokenizer.convert_tokens_to_ids(token) for token in TOKENS[kind]]
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(_config(kind, ids, len(tokenizer)))
    for tensor in model.parameters():
        tensor.data += 0.02 * torch.randn_like(tensor)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _processor(kind).save_pretrained(folder)
    return folder


def _language(kind: str, words: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": words,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        **others,
    }


def _config(kind: str, ids: Sequence[int], words: int) -> Any:
    import transformers as t

    small = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": 32,
    }
    if kind in ("idefics3", "smolvlm"):
        made = t.Idefics3Config if kind == "idefics3" else t.SmolVLMConfig
        return made(
            vision_config=small,
            text_config=_language("llama", words),
            image_token_id=ids[0],
            scale_factor=2,
            tie_word_embeddings=True,
        )
    if kind == "internvl":
        return t.InternVLConfig(
            vision_config={**small, "image_size": [32, 32], "patch_size": [8, 8]},
            text_config=_language("qwen2", words),
            image_token_id=ids[0],
            image_seq_length=4,
        )
    if kind == "gemma3":
        return t.Gemma3Config(
            vision_config=small,
            text_config=_language("gemma3_text", words, sliding_window=16),
            image_token_index=ids[0],
            boi_token_index=ids[1],
            eoi_token_index=ids[2],
            mm_tokens_per_image=4,
        )
    if kind == "llava_next":
        return t.LlavaNextConfig(
            vision_config=_vision_config(),
            text_config=_language("llama", words),
            image_token_index=ids[0],
            image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        )
    if kind == "paligemma":
        tower = t.SiglipVisionConfig(**small, projection_dim=32)
        text = _language("gemma", words)
        return t.PaliGemmaConfig(
            vision_config=tower, text_config=text, image_token_index=ids[0], projection_dim=32
        )
    if kind.startswith("gemma4"):
        return _gemma4(ids, words, small, each_layer=kind == "gemma4_small")
    places = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    shared = {
        "image_token_id": ids[0],
        "vision_start_token_id": ids[1],
        "vision_end_token_id": ids[2],
        "video_token_id": ids[3],
        "tie_word_embeddings": True,
    }
    tower = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "out_hidden_size": 32,
    }
    if kind == "qwen2_5_vl":
        language = _language("qwen2_5_vl_text", words, rope_parameters=places)
        seen = {**tower, "window_size": 32, "fullatt_block_indexes": [1]}
        return t.Qwen2_5_VLConfig(vision_config=seen, text_config=language, **shared)
    assert kind == "qwen3_vl", kind
    language = _language("qwen3_vl_text", words, rope_parameters=places)
    seen = {**tower, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    return t.Qwen3VLConfig(vision_config=seen, text_config=language, **shared)


def _gemma4(ids: Sequence[int], words: int, small: dict[str, Any], *, each_layer: bool) -> Any:
    """With a window and picture tokens that see each other; or, as the small ones, with embeddings for each layer."""
    import transformers as t

    text = _language(
        "gemma4_text",
        words,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        global_head_dim=16,
        hidden_size_per_layer_input=16 if each_layer else 0,
        vocab_size_per_layer_input=words,
        use_bidirectional_attention=None if each_layer else "vision",
        final_logit_softcapping=5.0,
    )
    tower = {
        **{k: v for k, v in small.items() if k != "image_size"},
        "model_type": "gemma4_vision",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }
    names = ("image", "boi", "eoi", "video", "audio")
    numbers = {f"{name}_token_id": number for name, number in zip(names, ids, strict=True)}
    return t.Gemma4Config(vision_config=tower, text_config=text, audio_config=None, **numbers)


def _processor(kind: str) -> Any:
    import transformers as t

    square = {"height": 32, "width": 32}
    if kind in ("idefics3", "smolvlm"):
        made = t.Idefics3ImageProcessorPil if kind == "idefics3" else t.SmolVLMImageProcessorPil
        return made(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    if kind == "internvl":
        return t.GotOcr2ImageProcessorPil(size=square, crop_to_patches=True, max_patches=4)
    if kind == "gemma3":
        return t.Gemma3ImageProcessorPil(size=square)
    if kind == "llava_next":
        pinpoints = [[32, 64], [64, 32], [64, 64]]
        return t.LlavaNextImageProcessorPil(
            size={"shortest_edge": 32}, crop_size=square, image_grid_pinpoints=pinpoints
        )
    if kind == "paligemma":
        found = t.SiglipImageProcessorPil(size=square)
        found.image_seq_length = 16
        return found
    if kind.startswith("gemma4"):
        return t.Gemma4ImageProcessorPil(patch_size=8, pooling_kernel_size=2, max_soft_tokens=70)
    sizes = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    return t.Qwen2VLImageProcessorPil(size=sizes, patch_size=8, merge_size=2)
