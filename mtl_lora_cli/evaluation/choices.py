"""Scoring candidate answers by their log-probability, each prompt computed once.

log p(choice) = Σ_i log p(token_i | prompt, tokens before it). The prompt and what all candidates
begin with form one segment; each candidate's rest is a branch that attends to it. A candidate
whose rest is a single token needs no token of its own: the prompt's last position answers it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.models.attention import Segments
from mtl_lora_cli.models.packed import PackedBatch, PackedModel
from mtl_lora_cli.tasks.rendering import Example


@dataclass(frozen=True)
class Request:
    """One example to score.

    Attributes:
        task: task id, or -1 for the base model alone.
        prompt: tokens.
        choices: tokens of each candidate as it follows the prompt.
        truncated: the prompt was cut to fit the model's positions.
    """

    task: int
    prompt: list[int]
    choices: list[list[int]]
    truncated: bool = False

    @property
    def shared(self) -> int:
        """Number of first tokens that all candidates have in common."""
        shortest = min(len(choice) for choice in self.choices)
        first = self.choices[0]
        for place in range(shortest):
            if any(choice[place] != first[place] for choice in self.choices):
                return place
        return shortest

    @property
    def cost(self) -> int:
        """Tokens that go through the model."""
        shared = self.shared
        rest = sum(max(0, len(choice) - shared - 1) for choice in self.choices)
        return len(self.prompt) + shared + rest


def build_requests(
    examples: Sequence[Example], task: int, encoder: Encoder, limit: int
) -> list[Request]:
    """Tokenise examples for scoring; a free answer is its example's only candidate.

    A prompt that leaves no room for its longest candidate within `limit` positions is cut at its
    beginning, as lm-evaluation-harness does, and marked.
    """
    prompts, answers = encoder.continuations(
        [example.prompt for example in examples],
        [example.choices or (example.answer,) for example in examples],
    )
    requests = []
    for prompt, choices in zip(prompts, answers, strict=True):
        room = limit - max(len(choice) for choice in choices)
        short = encoder.shorten(prompt, max(1, room))
        requests.append(Request(task, short, choices, truncated=len(short) < len(prompt)))
    return requests


def score(
    packed: PackedModel,
    requests: Sequence[Request],
    *,
    device: torch.device,
    tokens_per_pass: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[np.ndarray]:
    """Log-probabilities of every candidate of every request.

    Args:
        packed: the model.
        requests: of any tasks, in any order.
        device: the model's.
        tokens_per_pass: requests are put together up to so many tokens.
        advance: called with the number of requests done since the last call.

    Returns:
        For each request its candidates' log-probabilities, float64 [choices], in request order.
    """
    results: list[np.ndarray] = [np.empty(0)] * len(requests)
    training = packed.training
    packed.eval()
    try:
        for numbers in fill_passes([request.cost for request in requests], tokens_per_pass):
            batch, owners = _batch([requests[number] for number in numbers])
            moved = batch.to(device)
            with torch.inference_mode(), packed.routed(moved):
                logprobs = packed(moved).double().cpu().numpy()
            sums = np.zeros(int(owners[-1]) + 1)
            np.add.at(sums, owners, logprobs)
            start = 0
            for number in numbers:
                end = start + len(requests[number].choices)
                results[number] = sums[start:end]
                start = end
            advance(len(numbers))
    finally:
        packed.train(training)
    return results


def fill_passes(costs: Sequence[int], tokens_per_pass: int) -> Iterator[list[int]]:
    """Request numbers put together up to so many tokens, each pass holding at least one.

    Longest first, so that the first pass shows whether memory suffices.
    """
    current: list[int] = []
    used = 0
    for number in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        if current and used + costs[number] > tokens_per_pass:
            yield current
            current, used = [], 0
        current.append(number)
        used += costs[number]
    if current:
        yield current


def _batch(requests: Sequence[Request]) -> tuple[PackedBatch, np.ndarray]:
    """The batch, and for each of its questions the candidate (counted over all) it belongs to."""
    tokens: list[int] = []
    places: list[int] = []
    tasks: list[int] = []
    lengths: list[int] = []
    contexts: list[int] = []
    asked_at: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    candidate = 0

    def add(segment: list[int], first_place: int, task: int, context: int) -> int:
        start = len(tokens)
        tokens.extend(segment)
        places.extend(range(first_place, first_place + len(segment)))
        tasks.extend([task] * len(segment))
        lengths.append(len(segment))
        contexts.append(context)
        return start

    for request in requests:
        shared = request.shared
        context = request.prompt + request.choices[0][:shared]
        number = len(lengths)
        start = add(context, 0, request.task, -1)
        for choice in request.choices:
            rest = choice[shared:]
            before = list(range(start + len(request.prompt) - 1, start + len(context)))
            at = before if rest else before[:-1]
            if len(rest) > 1:
                branch = add(rest[:-1], len(context), request.task, number)
                at = [*at, *range(branch, branch + len(rest) - 1)]
            asked_at.extend(at)
            targets.extend(choice)
            owners.extend([candidate] * len(choice))
            candidate += 1
    positions, owner = np.unique(np.asarray(asked_at), return_inverse=True)
    batch = PackedBatch(
        input_ids=torch.tensor([tokens]),
        position_ids=torch.tensor([places]),
        task_ids=torch.tensor([tasks]),
        segments=Segments.build(lengths, contexts),
        positions=torch.from_numpy(positions),
        owner=torch.from_numpy(owner),
        targets=torch.tensor(targets),
    )
    return batch, np.asarray(owners)
