"""Answers that grow by a token a step, with a cache where it says the same: beside transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_lora_cli.data.pictured import Eyes
from mtl_lora_cli.evaluation.asked import Ask
from mtl_lora_cli.evaluation.continuing import find_manner
from mtl_lora_cli.evaluation.generate import answer_all
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.trust import settle
from mtl_lora_cli.pictures.shown import Picture

from ..sights import TOKENS
from .conftest import packed_of, some_at_once
from .test_packed import EXAMPLES, picture, tokens

LENGTH = 6


@pytest.mark.parametrize(
    "kind", some_at_once(["llava", *TOKENS], "qwen3_vl", "paligemma", "gemma4")
)
def test_each_type_continues_as_transformers_own_generate(
    kind: str, llava: BaseModel, models: Callable[[str], BaseModel], tmp_path: Path
) -> None:
    packed = packed_of(llava if kind == "llava" else models(kind), kind=kind)
    settle(packed)
    vision: Any = packed.vision
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    eyes = Eyes(vision)
    asks, device = [], torch.device("cpu")
    for task, words, shown in EXAMPLES:
        if shown:
            pictures = tuple(Picture(tmp_path, f"{number}.png") for number in shown)
            asks.append(
                Ask(tokens(packed, words, shown), task, LENGTH, pictures=pictures, eyes=eyes)
            )
    assert find_manner(packed, asks, device).cached
    answers = answer_all(packed, asks, ends=(), device=device, tokens_per_pass=512)
    for ask, answer in zip(asks, answers, strict=True):
        ids = torch.tensor([ask.prompt])
        given = vision.alone(eyes.looked(ask.pictures), ids == vision.token_id, len(ask.prompt))
        with torch.no_grad(), packed.over_rows(ask.task) as model:
            found = model.generate(
                input_ids=ids, max_new_tokens=LENGTH, do_sample=False, use_cache=True,
                eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(ids), **given,
            )  # fmt: skip
        assert answer == found[0, len(ask.prompt) :].tolist()
