"""Making a tiny model's folder: its configuration, weights that matter, and a tokenizer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mtl_lora_cli import resources

from .models import COMMON, VISION, VOCABULARY, Tiny

AUTO = "AutoConfig"


def build(model: Tiny, folder: Path) -> Path:
    """Write the model and a tokenizer to a folder that is new or empty."""
    torch.manual_seed(0)
    made = auto_class(model).from_config(configuration(model), dtype=torch.float32)
    _let_weights_matter(made, model.gain)
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@cache
def tokenizer() -> Any:
    """Pieces of bytes, learned from the sample tasks: every family's own class reads it alike."""
    samples = resources.bundled("data_templates") / "samples"
    texts = [path.read_text(encoding="utf-8") for path in sorted(samples.rglob("train.jsonl"))]
    pieces = Tokenizer(BPE())
    pieces.pre_tokenizer = ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    pieces.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def auto_class(model: Tiny) -> Any:
    """The class that loads the model as it is on the hub."""
    return AutoModelForCausalLM if model.vision is None else AutoModelForImageTextToText


def configuration(model: Tiny) -> Any:
    """What `COMMON` has of it, and its own keys."""
    kind = CONFIG_MAPPING[model.model_type]
    keys = {**_known(kind, COMMON), **model.config}
    for name, own, common in (("text", model.text, COMMON), ("vision", model.vision, VISION)):
        if own is not None:
            part = kind.sub_configs[f"{name}_config"]
            if part.__name__ == AUTO:
                part = CONFIG_MAPPING[own["model_type"]]
            keys[f"{name}_config"] = {**_known(part, common), **own}
    return kind(**copy.deepcopy(keys))  # a configuration writes into what it is given


def _known(kind: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
    fields = {one.name for one in dataclasses.fields(kind)} | set(kind.attribute_map)
    return {key: value for key, value in keys.items() if key in fields}


@torch.no_grad()
def _let_weights_matter(model: nn.Module, gain: float) -> None:
    """Matrices ~ N(0, (gain/√fan-in)²); vectors, which often start as zeros or ones, move a little."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=gain / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
