"""Generated answers: what the model says when nobody offers it candidates, the likeliest or a drawn one.

Prompts of about one length go through transformers' own model together, and its cache keeps what they
leave, as far as that changes no answer (`continuing.py`): each further token costs one position a row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtl_lora_cli.evaluation.choices import Advance, Request, fill_passes
from mtl_lora_cli.evaluation.continuing import ALONE_ANEW, ContinuedRows, Manner, find_manner
from mtl_lora_cli.machine.processes import ALONE, Processes
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.tasks.reading import Reading

__all__ = ["Reading", "Sampling", "generate"]

Stopped = Callable[[list[int]], bool]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: p ∝ exp(logit / temperature).

    What is drawn depends on the logits, the seed, and the numbers of request and answer alone: not on what
    is answered with it, nor by how many processes.

    Attributes:
        temperature: 0: the likeliest.
        seed: of all draws.
        answers: how many answers a prompt gets.
        first: the number of the first request among all that are answered with this seed.
    """

    temperature: float
    seed: int = 0
    answers: int = 1
    first: int = 0

    def uniforms(self, number: int) -> Iterator[float]:
        """Numbers in [0, 1), one for each token of an answer.

        Args:
            number: of the answer, where those of one prompt stand behind each other.
        """
        request, own = divmod(number, self.answers)
        generator = np.random.default_rng([self.seed, self.first + request, own])
        while True:
            yield from generator.random(64).tolist()

    def drawn(self, logits: Tensor, uniforms: Sequence[float]) -> Tensor:
        """One token a row, int64 [B], for logits [B, V]: the first whose summed probability exceeds u."""
        likely = (logits.double() / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        bounds = torch.tensor(uniforms, dtype=likely.dtype, device=likely.device)[:, None]
        below = (likely <= bounds * likely[:, -1:]).sum(dim=-1)
        return below.clamp(max=logits.shape[-1] - 1)


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
    processes: Processes = ALONE,
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, or drawn ones.

    Args:
        packed: the model.
        requests: prompts with their tasks; their candidates are not looked at.
        ends: tokens that end an answer and are not part of it.
        new_tokens: for each request the most tokens that its answer may have.
        device: the model's.
        tokens_per_pass: prompts are put together up to so many tokens.
        stopped: whether an answer is complete as it stands.
        advance: called with the number of this process's requests done since the last call.
        processes: this process among those that answer the same requests together.
        sampling: draw; of several answers each prompt's stand behind each other. None: the likeliest tokens.

    Returns:
        Tokens of each answer.
    """
    if sampling is not None and sampling.answers > 1:
        requests = [one for one in requests for _ in range(sampling.answers)]
        new_tokens = [most for most in new_tokens for _ in range(sampling.answers)]
    costs = [len(request.prompt) + new_tokens[number] for number, request in enumerate(requests)]
    own = processes.share(costs)
    answers: dict[int, list[int]] = {}
    training = packed.training
    packed.eval()
    try:
        with torch.inference_mode():
            manner = find_manner(packed, [requests[number] for number in own], device)
            for numbers, how in _passes(packed, manner, requests, own, costs, tokens_per_pass):
                prompts = [requests[number].prompt for number in numbers]
                limits = [new_tokens[number] for number in numbers]
                with packed.over_rows(requests[numbers[0]].task) as model:
                    rows = ContinuedRows(model, prompts, device, cached=how.cached)
                    pick = _picker(sampling, numbers)
                    found = _continued(rows, limits, ends, stopped, pick)
                answers.update(zip(numbers, found, strict=True))
                advance(len(numbers))
    finally:
        packed.train(training)
    return processes.collect(answers)


def _passes(
    packed: PackedModel,
    manner: Manner,
    requests: Sequence[Request],
    own: Sequence[int],
    costs: Sequence[int],
    tokens_per_pass: int,
) -> Iterator[tuple[list[int], Manner]]:
    """Numbers of the requests of one task that are answered together, and how.

    Where another row's length could change an answer, or state would run over what fills a row up, only
    prompts of one length are; where even rows of one length could, or the rotary embedding may change
    on the way, each is answered by itself.
    """
    limit = packed.together
    groups: dict[tuple[int, int, Manner], list[int]] = {}
    for number in own:
        beyond = limit is not None and costs[number] > limit
        how = ALONE_ANEW if beyond else manner
        alike = {"packed": 0, "rows": len(requests[number].prompt), "single": number}[how.layout]
        groups.setdefault((requests[number].task, alike, how), []).append(number)
    for (_, _, how), group in groups.items():
        for some in fill_passes([costs[number] for number in group], tokens_per_pass):
            yield [group[place] for place in some], how


def _picker(sampling: Sampling | None, numbers: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """From the logits of the answers with these numbers to their next tokens."""
    if sampling is None:
        return lambda logits: logits.argmax(dim=-1)
    streams = [sampling.uniforms(number) for number in numbers]
    return lambda logits: sampling.drawn(logits, [next(stream) for stream in streams])


def _continued(
    rows: ContinuedRows,
    limits: Sequence[int],
    ends: Collection[int],
    stopped: Stopped,
    pick: Callable[[Tensor], Tensor],
) -> list[list[int]]:
    """What follows each prompt: one token after the other, until all are complete."""
    answers: list[list[int]] = [[] for _ in limits]
    going = [limit > 0 for limit in limits]
    while any(going):
        picked = pick(rows.logits())
        for row, token in enumerate(picked.tolist()):
            if not going[row]:
                continue
            if token not in ends:
                answers[row].append(token)
            going[row] = (
                token not in ends and len(answers[row]) < limits[row] and not stopped(answers[row])
            )
        rows.add(picked)
    return answers
