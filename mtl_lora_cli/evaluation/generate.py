"""Greedy answers: what the model says when nobody offers it candidates.

Prompts of about one length go through transformers' own model together, filled up on the left, and
its key-value cache keeps what they leave: each further token costs one position a row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.evaluation.choices import Advance, Request, fill_passes
from mtl_lora_cli.evaluation.ranks import ALONE, Shard
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.tasks.reading import Reading

__all__ = ["Reading", "generate"]

Stopped = Callable[[list[int]], bool]


def generate(
    packed: PackedModel,
    requests: Sequence[Request],
    *,
    ends: Collection[int],
    new_tokens: Sequence[int],
    device: torch.device,
    tokens_per_pass: int,
    stopped: Stopped = lambda answer: False,
    advance: Advance = lambda done: None,
    shard: Shard = ALONE,
) -> list[list[int]]:
    """The greedy continuation of each prompt.

    Args:
        packed: the model.
        requests: prompts with their tasks; their candidates are not looked at.
        ends: tokens that end an answer and are not part of it.
        new_tokens: for each request the most tokens that its answer may have.
        device: the model's.
        tokens_per_pass: prompts are put together up to so many tokens.
        stopped: whether an answer is complete as it stands.
        advance: called with the number of this process's requests done since the last call.
        shard: this process among those that answer the same requests together.

    Returns:
        Tokens of each answer.
    """
    costs = [len(request.prompt) + new_tokens[number] for number, request in enumerate(requests)]
    own = shard.share(costs)
    answers: dict[int, list[int]] = {}
    training = packed.training
    packed.eval()
    try:
        for numbers in _passes(packed, requests, own, costs, tokens_per_pass):
            rows = [requests[number].prompt for number in numbers]
            limits = [new_tokens[number] for number in numbers]
            with torch.inference_mode(), packed.over_rows(requests[numbers[0]].task) as model:
                found = _continued(model, rows, limits, ends, stopped, device)
            answers.update(zip(numbers, found, strict=True))
            advance(len(numbers))
    finally:
        packed.train(training)
    return shard.gather(answers)


def _passes(
    packed: PackedModel,
    requests: Sequence[Request],
    own: Sequence[int],
    costs: Sequence[int],
    tokens_per_pass: int,
) -> Iterator[list[int]]:
    """Numbers of the requests of one task that are answered together.

    Where another row's length could change an answer, or state would run over what fills a row up, only
    prompts of one length are; where even rows of one length could, each is answered by itself.
    """
    layout = "packed" if packed.plain is None else packed.plain.way.layout
    groups: dict[tuple[int, int], list[int]] = {}
    for number in own:
        alike = {"packed": 0, "rows": len(requests[number].prompt), "single": number}[layout]
        groups.setdefault((requests[number].task, alike), []).append(number)
    for group in groups.values():
        for some in fill_passes([costs[number] for number in group], tokens_per_pass):
            yield [group[place] for place in some]


def _continued(
    model: Any,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    ends: Collection[int],
    stopped: Stopped,
    device: torch.device,
) -> list[list[int]]:
    """What follows each prompt: the likeliest token, again and again, until all are complete."""
    answers: list[list[int]] = [[] for _ in prompts]
    going = [limit > 0 for limit in limits]
    ids, mask = (tensor.to(device) for tensor in _filled_up(prompts))
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    known = signature(model.forward).parameters
    kept = "cache_params" if "cache_params" in known else "past_key_values"
    cache = None
    while any(going):
        wanted = {"position_ids": places, "logits_to_keep": 1, kept: cache}
        out = model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            **{name: value for name, value in wanted.items() if name in known},
        )
        cache = getattr(out, kept)
        likeliest = out.logits[:, -1].argmax(dim=-1)
        for row, token in enumerate(likeliest.tolist()):
            if not going[row]:
                continue
            if token not in ends:
                answers[row].append(token)
            going[row] = (
                token not in ends and len(answers[row]) < limits[row] and not stopped(answers[row])
            )
        ids, places = likeliest[:, None], places[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return answers


def _filled_up(prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens and mask, int64 [B, L], what is missing on the left."""
    longest = max(len(prompt) for prompt in prompts)
    missing = [longest - len(prompt) for prompt in prompts]
    ids = [[0] * gap + prompt for gap, prompt in zip(missing, prompts, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in missing]
    return torch.tensor(ids), torch.tensor(mask)
