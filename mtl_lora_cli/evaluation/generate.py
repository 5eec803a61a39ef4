"""Greedy answers: what the model says when nobody offers it candidates.

Every step runs the whole packed sequences again, without a key-value cache: answers here are a few
tokens long, and the path is the one that training and scoring use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from mtl_lora_cli.evaluation.choices import Request, fill_passes
from mtl_lora_cli.models.attention import Segments
from mtl_lora_cli.models.packed import PackedBatch, PackedModel


def generate(
    packed: PackedModel,
    requests: Sequence[Request],
    *,
    end: int,
    new_tokens: Sequence[int],
    device: torch.device,
    tokens_per_pass: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """The greedy continuation of each prompt.

    Args:
        packed: the model.
        requests: prompts with their tasks; their candidates are not looked at.
        end: the end token; it ends an answer and is not part of it.
        new_tokens: for each request the most tokens that its answer may have.
        device: the model's.
        tokens_per_pass: prompts are put together up to so many tokens.
        advance: called with the number of requests done since the last call.

    Returns:
        Tokens of each answer.
    """
    answers: list[list[int]] = [[] for _ in requests]
    packed.eval()
    costs = [len(request.prompt) for request in requests]
    for numbers in fill_passes(costs, tokens_per_pass):
        open_ones = list(numbers)
        while open_ones:
            batch = _batch([(requests[i].task, requests[i].prompt + answers[i]) for i in open_ones])
            moved = batch.to(device)
            with torch.inference_mode(), packed.routed(moved):
                following = packed.logits(moved).argmax(dim=-1).tolist()
            for number, token in zip(open_ones, following, strict=True):
                answers[number].append(token)
            open_ones = [
                i for i in open_ones if answers[i][-1] != end and len(answers[i]) < new_tokens[i]
            ]
        advance(len(numbers))
    return [answer[:-1] if answer and answer[-1] == end else answer for answer in answers]


def parse_answer(text: str, choices: Sequence[str]) -> int:
    """Which choice an answer begins with, -1 if none: the first line counts, case does not.

    No choice may begin another one (`prefix_conflict`), so at most one fits.
    """
    first = text.strip().split("\n")[0].strip().casefold()
    for number, choice in enumerate(choices):
        if first.startswith(choice.casefold()):
            return number
    return -1


def _batch(sequences: Sequence[tuple[int, list[int]]]) -> PackedBatch:
    lengths = [len(tokens) for _, tokens in sequences]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    none: Any = torch.empty(0, dtype=torch.long)
    return PackedBatch(
        input_ids=torch.tensor([[token for _, tokens in sequences for token in tokens]]),
        position_ids=torch.cat([torch.arange(b - a) for a, b in pairwise(ends.tolist())])[None],
        task_ids=torch.tensor([[task for task, tokens in sequences for _ in tokens]]),
        segments=Segments.build(lengths),
        positions=ends[1:] - 1,
        owner=none,
        targets=none,
    )
