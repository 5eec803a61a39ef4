"""Each model type's own processor, and what it makes of a text with a picture beside what we make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

# The others read videos, too, and cannot be built without it.
WITHOUT_TORCHVISION = ("idefics3", "gemma3", "llava_next", "paligemma")


@dataclass(frozen=True)
class Compared:
    """How far our reading of a picture is from a processor's.

    Attributes:
        tokens_equal: of the text around it and of the picture.
        grids_equal: all whole numbers beside them: grids, masks, places, sizes.
        pixels_apart: largest |Δ| of a pixel as the tower takes it.
        tokens: how many there are.
    """

    tokens_equal: bool
    grids_equal: bool
    pixels_apart: float
    tokens: int


def compared(kind: str, tokenizer: Any, own: Any, picture: Image.Image) -> Compared:
    """Ours beside `own`, the processor of that model type."""
    vision = tokenizer.vision()
    mark = own.boi_token if kind == "gemma3" else own.image_token
    theirs = own(text=[f"one {mark} two"], images=[picture], return_tensors="pt")
    ids = ours_of(kind, tokenizer, f"one {vision.text(picture.height, picture.width)} two")
    right = theirs["input_ids"][0].tolist()
    grids, apart = True, 0.0
    for name, value in vision.join([vision.look(picture)]).items():
        wanted = torch.as_tensor(theirs[name])
        if kind == "llava_next" and name == "pixel_values":
            wanted = wanted[0]
        if value.shape != wanted.shape:
            grids, apart = False, float("inf")
        elif value.is_floating_point():
            apart = max(apart, float((value - wanted).abs().max()))
        else:
            grids = grids and torch.equal(value, wanted)
    return Compared(ids == right, grids, apart, len(right))


def ours_of(kind: str, tokenizer: Any, text: str) -> list[int]:
    """Our tokens, laid as the processor lays them where ours stand elsewhere on purpose."""
    vision = tokenizer.vision()
    if kind == "paligemma":
        text += "\n"
    if kind.startswith("qwen"):  # the chat template writes what stands around a picture
        text = text.replace("<|vision_start|>", "").replace("<|vision_end|>", "")
    ids: list[int] = tokenizer(text)["input_ids"]
    if kind == "paligemma":  # its processor writes the text's begin behind the picture
        ids = [one for one in ids if one != tokenizer.bos_token_id]
        end = len(ids) - ids[::-1].index(vision.token_id)
        ids = [*ids[:end], tokenizer.bos_token_id, *ids[end:]]
    return ids


def processor_of(kind: str, tokenizer: Any) -> Any:
    """The model's own."""
    import transformers as t

    vision = tokenizer.vision()
    if kind == "idefics3":
        seen = {"image_processor": vision.processor, "tokenizer": tokenizer, "image_seq_len": 4}
        return t.Idefics3Processor(**seen)
    if kind == "llava_next":
        seen = {"image_processor": vision.processor, "tokenizer": tokenizer, "patch_size": 8}
        return t.LlavaNextProcessor(
            **seen, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    if kind == "paligemma":
        vision.processor.image_seq_length = 16
        tokenizer.image_token, tokenizer.image_token_id = vision.token, vision.token_id
        return t.PaliGemmaProcessor(vision.processor, tokenizer)
    if kind.startswith("gemma4"):
        for name in ("image", "boi", "eoi", "audio"):
            number = getattr(vision.config, f"{name}_token_id")
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
            setattr(tokenizer, f"{name}_token_id", number)
        # It asks for the tokens around a sound, too, and for one that fills up: these folders have none.
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.boa_token, tokenizer.eoa_token = tokenizer.boi_token, tokenizer.eoi_token
        extractor = t.Gemma4AudioFeatureExtractor()
        return t.Gemma4Processor(
            extractor, vision.processor, tokenizer, t.Gemma4VideoProcessor(), image_seq_length=70
        )
    if kind == "gemma3":
        tokenizer.boi_token, tokenizer.eoi_token = "<start_of_image>", "<end_of_image>"
        tokenizer.image_token, tokenizer.boi_token_id = "<image_soft_token>", 513
        tokenizer.image_token_id = vision.token_id
        return t.Gemma3Processor(vision.processor, tokenizer, image_seq_length=4)
    made = {
        "smolvlm": (t.SmolVLMProcessor, t.SmolVLMVideoProcessor, {"image_seq_len": 4}),
        "internvl": (t.InternVLProcessor, t.InternVLVideoProcessor, {"image_seq_length": 4}),
        "qwen2_5_vl": (t.Qwen2_5_VLProcessor, t.Qwen2VLVideoProcessor, {}),
        "qwen3_vl": (t.Qwen3VLProcessor, t.Qwen3VLVideoProcessor, {}),
    }
    processor, video, others = made[kind]
    if kind == "internvl":
        tokenizer.start_image_token, tokenizer.end_image_token = "<img>", "</img>"
        tokenizer.context_image_token, tokenizer.video_token = "<IMG_CONTEXT>", "<img>"
        tokenizer.start_image_token_id, tokenizer.end_image_token_id = 513, 514
        tokenizer.context_image_token_id = 512
    return processor(vision.processor, tokenizer, video_processor=video(), **others)
