"""Drawn answers: by the model's own probabilities, the same for a seed whatever else is answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_lora_cli.evaluation.asked import Sampling
from mtl_lora_cli.evaluation.generate import generate
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model, load_tokenizer
from mtl_lora_cli.models.packed import PackedModel

CPU = torch.device("cpu")
TEXTS = ("Once upon a time", "Lily and Tom went to the", "The dog was very")


@pytest.fixture(scope="module")
def packed(stories_folder: Path) -> PackedModel:
    found = find_base_model(str(stories_folder))
    return PackedModel(load_model(found, dtype=torch.float32, device=CPU)).eval()


@pytest.fixture(scope="module")
def prompts(stories_folder: Path) -> list[Request]:
    tokenizer = load_tokenizer(find_base_model(str(stories_folder)))
    return [Request(-1, tokenizer(text)["input_ids"], [[]]) for text in TEXTS]


def answers(
    packed: PackedModel,
    requests: list[Request],
    sampling: Sampling | None,
    new: int = 8,
    **more: Any,
) -> list[list[int]]:
    settings = {"device": CPU, "tokens_per_pass": 1000, "ends": [2], **more}
    limits = [new] * len(requests)
    return generate(packed, requests, new_tokens=limits, sampling=sampling, **settings)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_by_the_models_probabilities(
    packed: PackedModel, prompts: list[Request], stories_folder: Path, temperature: float
) -> None:
    """4,000 first tokens beside softmax(logits / temperature) of transformers alone: χ² over the likeliest."""
    from scipy import stats
    from transformers import AutoModelForCausalLM

    count = 4000
    drawn = answers(
        packed, prompts[:1], Sampling(temperature, 5, count), new=1, tokens_per_pass=20_000
    )
    plain = AutoModelForCausalLM.from_pretrained(stories_folder, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = plain(torch.tensor([prompts[0].prompt])).logits[0, -1]
    likely = (logits / temperature).softmax(-1).numpy()
    found = np.bincount([one[0] if one else 2 for one in drawn], minlength=len(likely))
    often = likely * count >= 5
    seen = [*found[often], found[~often].sum()]
    expected = [*(likely[often] * count), likely[~often].sum() * count]
    keep = [place for place, value in enumerate(expected) if value > 0]
    assert stats.chisquare([seen[n] for n in keep], [expected[n] for n in keep]).pvalue > 1e-3


def test_a_seed_gives_the_same_answers_however_they_are_put_together(
    packed: PackedModel, prompts: list[Request]
) -> None:
    together = answers(packed, prompts, Sampling(1.0, 7, 2))
    assert together == answers(packed, prompts, Sampling(1.0, 7, 2), tokens_per_pass=1)
    assert together != answers(packed, prompts, Sampling(1.0, 8, 2))
    assert len(together) == 6 and together[0] != together[1], "two answers of one prompt differ"
    one = answers(packed, prompts, Sampling(1.0, 7))
    assert one == together[::2], "the first answer does not depend on how many there are"
    later = answers(packed, prompts[1:], Sampling(1.0, 7, 2, first=1))
    assert later == together[2:]


def test_without_a_temperature_the_likeliest_tokens_are_taken(
    packed: PackedModel, prompts: list[Request]
) -> None:
    greedy = answers(packed, prompts, None)
    assert answers(packed, prompts, Sampling(1e-4)) == greedy
