"""Greedy answers: they equal transformers' own, and what they name is read without guessing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtl_lora_cli.evaluation.choices import Request
from mtl_lora_cli.evaluation.generate import generate, parse_answer
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model, load_tokenizer
from mtl_lora_cli.models.packed import PackedModel

TEXTS = ("Once upon a time", "Lily and Tom went to the", "The dog was very", "One day a girl named")


def test_greedy_answers_equal_those_of_transformers(stories_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = find_base_model(str(stories_folder))
    tokenizer = load_tokenizer(base)
    device = torch.device("cpu")
    packed = PackedModel(load_model(base, dtype=torch.float32, device=device))
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    ours = generate(
        packed,
        [Request(-1, prompt, [[]]) for prompt in prompts],
        end=tokenizer.eos_token_id,
        new_tokens=[12, 5, 12, 12],
        device=device,
        tokens_per_pass=32,
    )
    plain = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    for prompt, answer, count in zip(prompts, ours, [12, 5, 12, 12], strict=True):
        theirs = plain.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert answer == [token for token in theirs if token != tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" yes", 0),
        ("No, it is not", 1),
        ("maybe\nyes", -1),
        ("", -1),
        ("it is yes", -1),
        ("YES.", 0),
    ],
)
def test_an_answer_is_the_choice_that_it_begins_with(text: str, expected: int) -> None:
    assert parse_answer(text, ("yes", "no")) == expected
