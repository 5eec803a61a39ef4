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


def tiny_llava(language: Path, folder: Path) -> Path:
    """A LLaVA whose language part is a small trained model; 16 tokens a picture."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        CLIPImageProcessorPil,
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
    sides = {"height": 32, "width": 32}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=sides)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
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
