"""What transformers alone says of a text: the other side of a check."""

from __future__ import annotations

from typing import Any

import torch


def log_probability(model: Any, prompt: list[int], choice: list[int]) -> float:
    """log p(choice | prompt), from a forward pass of the whole text through a model of transformers'."""
    tokens = torch.tensor([*prompt, *choice])
    with torch.no_grad():
        logprobs = model(tokens[None]).logits[0].log_softmax(-1)
    return sum(float(logprobs[i - 1, tokens[i]]) for i in range(len(prompt), len(tokens)))
