"""Rows that grow on the fused engine, in float64 against transformers on each row alone, whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtl_lora_cli.engine.rows import KeptRows, obstacle_to_rows
from mtl_lora_cli.models.packed import PackedModel

from .double import adapt_all, in_double, tiny
from .test_families import CASES

STEPS = 4
# Scaled queries and experts are not computed here yet.
SURE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "smollm3",
    "phi3",
    "glm4",
    "olmo2",
)
PROMPTS = ([5, 9, 11, 3, 8, 2, 7], [4, 6, 12], [9, 9, 1, 2, 14, 5, 3, 10, 4])


def alone(packed: PackedModel, tokens: list[int], task: int) -> torch.Tensor:
    with packed.over_rows(task) as model:
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [pytest.param(k, changes, id=f"{k} {variant}".strip()) for k, variant, changes in CASES],
)
def test_rows_are_transformers_alone(model_type: str, changes: dict[str, Any]) -> None:
    """One row is put in another one's place on the way, and a new prompt in the place that it left."""
    model = tiny(model_type, **changes)
    packed = PackedModel(model, adapt_all(model), engine="fused").eval()
    assert packed.decoder is not None
    if obstacle_to_rows(packed.decoder, packed.head) is not None:
        assert model_type not in SURE
        return
    with torch.inference_mode(), in_double():
        grow(packed)


def grow(packed: PackedModel) -> None:
    assert packed.decoder is not None
    tasks = [1, -1, 0]
    kept = KeptRows(packed.decoder, packed.head, [0, 1], rows=4, length=16)
    texts = [list(prompt) for prompt in PROMPTS]
    found = kept.begin(texts, tasks, range(3))
    for step in range(STEPS):
        for row, (text, task) in enumerate(zip(texts, tasks, strict=True)):
            right = alone(packed, text, task)
            torch.testing.assert_close(found[row], right, rtol=1e-9, atol=1e-9)
        likeliest = found[: len(texts)].argmax(-1)
        kept.feed(range(len(texts)), likeliest)
        for row, token in enumerate(likeliest.tolist()):
            texts[row].append(token)
        if step == 1:
            kept.move(2, 0)
            texts[0], tasks[0] = texts.pop(), tasks.pop()
        if step == 2:
            texts.append([3, 1, 4])
            tasks.append(1)
            kept.feed([2], kept.begin(texts[2:], tasks[2:], [2]).argmax(-1))
            texts[2].append(int(alone(packed, texts[2], 1).argmax()))
        found = kept.step(len(texts))
