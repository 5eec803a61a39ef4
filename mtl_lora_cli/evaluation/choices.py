"""Scoring candidate answers by their log-probability, each prompt computed once.

log p(choice) = Σ_i log p(token_i | prompt, tokens before it). A prompt and its candidates form a tree
(`trees.py`), each position of which goes through the model once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mtl_lora_cli.data.collate import shown_in
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.evaluation.readout import Readout
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.evaluation.trees import Tree
from mtl_lora_cli.machine import threads
from mtl_lora_cli.machine.processes import ALONE, Processes
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.packed import PackedModel

Advance = Callable[[int], None]
_TOLD_APART = 16  # Triton compiles a kernel for numbers that are multiples of this, and for others


def score(
    packed: PackedModel,
    requests: Sequence[Request],
    *,
    device: torch.device,
    tokens_per_pass: int,
    advance: Advance = lambda done: None,
    processes: Processes = ALONE,
) -> list[np.ndarray]:
    """Log-probabilities of every candidate of every request.

    Args:
        packed: the model.
        requests: of any tasks, in any order.
        device: the model's.
        tokens_per_pass: requests are put together up to so many tokens.
        advance: called with the number of this process's requests done since the last call.
        processes: this process among those that score the same requests together.

    Returns:
        For each request its candidates' log-probabilities, float64 [choices], in request order.
    """
    summed = ask(
        packed,
        requests,
        lambda batch: packed(batch).unsqueeze(1),
        device=device,
        tokens_per_pass=tokens_per_pass,
        advance=advance,
        processes=processes,
    )
    return [sums[:, 0] for sums in summed]


def ask(
    packed: PackedModel,
    requests: Sequence[Request],
    question: Callable[[PackedBatch], Tensor],
    *,
    device: torch.device,
    tokens_per_pass: int,
    advance: Advance = lambda done: None,
    processes: Processes = ALONE,
) -> list[np.ndarray]:
    """Sums over each candidate's tokens of whatever `question` says of each token.

    The other arguments are those of `score`.

    Args:
        question: a batch on the device → [S, K].

    Returns:
        For each request float64 [choices, K], in request order.
    """
    parts = _apart(packed, requests)
    requests = [part for some in parts for part in some]
    own = processes.share([request.cost for request in requests])
    results: dict[int, np.ndarray] = {}
    first = set(np.cumsum([0, *(len(some) for some in parts)]).tolist())

    def collect(numbers: list[int], values: Readout) -> None:
        trees = [requests[number].tree for number in numbers]
        sums = _sums(trees, values.numpy())
        results.update(zip(numbers, sums, strict=True))
        advance(sum(number in first for number in numbers))

    training = packed.training
    packed.eval()
    try:
        running: tuple[list[int], Readout] | None = None
        for some in fill_passes([requests[number].cost for number in own], tokens_per_pass):
            numbers = [own[place] for place in some]
            threads.look(device)
            # On a card the pass before is still running while the next one is put together.
            batch = _batch([requests[number] for number in numbers])
            if packed.decoder is not None and device.type == "cuda":
                batch = filled(batch)
            moved = batch.to(device)
            with torch.inference_mode(), packed.routed(moved):
                values = Readout(question(moved))
            if running is not None:
                collect(*running)
            running = numbers, values
        if running is not None:
            collect(*running)
    finally:
        packed.train(training)
    found = iter(processes.collect(results))
    return [np.concatenate([next(found) for _ in some]) for some in parts]


def _apart(packed: PackedModel, requests: Sequence[Request]) -> list[list[Request]]:
    """Requests as they are, or a candidate each, where the model cannot share what candidates share."""
    limit = shared_up_to(packed)  # asked once: it looks at every layer
    return [_apart_beyond(request, limit) for request in requests]


def _each_alone(request: Request) -> list[Request]:
    passed = request.passed
    return [
        replace(request, choices=[choice], passed=None if passed is None else [passed[number]])
        for number, choice in enumerate(request.choices)
    ]


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


def _batch(requests: Sequence[Request]) -> PackedBatch:
    """Trees behind each other, asked for every token of every candidate."""
    trees = [request.tree for request in requests]
    sizes = np.asarray([len(tree.tokens) for tree in trees])
    answering = np.asarray([len(tree.asked) for tree in trees])
    first = answering.cumsum() - answering  # places among the positions that are asked
    counts = [len(tree.targets) for tree in trees]
    owner = np.concatenate([np.searchsorted(tree.asked, tree.owner) for tree in trees])
    owner = owner + np.repeat(first, counts)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    reach = np.concatenate([tree.reach for tree in trees]) + starts.repeat(sizes)
    branched = (reach < ends.repeat(sizes)).any()
    positions = np.concatenate([tree.asked for tree in trees]) + starts.repeat(answering)
    tasks = np.repeat([request.task for request in requests], sizes)

    def row(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    input_ids = row([tree.tokens for tree in trees])[None]
    eyes = next((request.eyes for request in requests if request.eyes is not None), None)
    batch = PackedBatch(
        input_ids=input_ids,
        position_ids=row([tree.places for tree in trees])[None],
        task_ids=torch.from_numpy(tasks)[None],
        segments=Segments.build(
            sizes.tolist(), torch.from_numpy(reach.astype(np.int32)) if branched else None
        ),
        positions=torch.from_numpy(positions.astype(np.int64)),
        owner=torch.from_numpy(owner),
        targets=row([tree.targets for tree in trees]),
    )
    if eyes is None:
        return batch
    prompts = [len(request.prompt) for request in requests]
    return shown_in(batch, [request.pictures for request in requests], eyes, prompts)


def filled(batch: PackedBatch) -> PackedBatch:
    """Positions and questions filled up to multiples of what Triton tells apart: kernels that training has
    compiled serve it, and no pass waits for other ones. What fills up answers nothing.
    """
    missing = -batch.input_ids.numel() % _TOLD_APART
    more = -len(batch.positions) % _TOLD_APART
    if batch.pictures is not None or not (missing or more):
        return batch
    nothing = torch.zeros(1, missing, dtype=torch.long)
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, nothing], dim=1),
        position_ids=torch.cat([batch.position_ids, torch.arange(missing)[None]], dim=1),
        task_ids=torch.cat([batch.task_ids, nothing + batch.task_ids[0, -1]], dim=1),
        segments=batch.segments.and_more([missing] if missing else []),
        positions=torch.cat([batch.positions, torch.zeros(more, dtype=torch.long)]),
    )


def _sums(trees: Sequence[Tree], values: np.ndarray) -> list[np.ndarray]:
    """values [S, K] of all trees' questions, added up for each candidate: [choices, K] each."""
    lengths = np.concatenate([tree.lengths for tree in trees])
    candidate = np.repeat(np.arange(len(lengths)), lengths)
    columns = [np.bincount(candidate, column, minlength=len(lengths)) for column in values.T]
    ends = np.cumsum([len(tree.lengths) for tree in trees])
    return np.split(np.stack(columns, axis=1), ends[:-1])


@dataclass(frozen=True)
class Passes:
    """Requests ready to go through the model, which need not be there yet: what `score` asks, by another hand.

    Attributes:
        batches: to be asked for each candidate's tokens, in any order.
        trees: of the requests in each batch.
        numbers: of those requests, their places among the parts.
        parts: how many of them each request was taken apart into.
    """

    batches: list[PackedBatch]
    trees: list[list[Tree]]
    numbers: list[list[int]]
    parts: list[int]

    @classmethod
    def build(
        cls, requests: Sequence[Request], shared_up_to: int | None, tokens_per_pass: int
    ) -> Passes:
        """As `score` would put them together, but in passes alike: none is left with a few tokens.

        Args:
            requests: of any tasks, in any order.
            shared_up_to: see `shared_up_to`.
            tokens_per_pass: as of `score`; a pass may have half as many more.
        """
        some = [_apart_beyond(request, shared_up_to) for request in requests]
        parts = [part for one in some for part in one]
        costs = [part.cost for part in parts]
        wanted = max(1, round(sum(costs) / tokens_per_pass))
        room = sum(costs) // wanted + max(costs, default=0)  # so these passes suffice
        numbers = list(fill_passes(costs, room))
        held = [[parts[number] for number in own] for own in numbers]
        trees = [[part.tree for part in own] for own in held]
        return cls([_batch(own) for own in held], trees, numbers, [len(one) for one in some])

    def scores(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probabilities of each request's candidates, float64 [choices], by those of each batch's tokens."""
        found: dict[int, np.ndarray] = {}
        for trees, numbers, own in zip(self.trees, self.numbers, values, strict=True):
            found.update(zip(numbers, _sums(trees, own[:, None]), strict=True))
        rest = iter(found[number] for number in range(len(found)))
        return [np.concatenate([next(rest)[:, 0] for _ in range(count)]) for count in self.parts]


def shared_up_to(packed: PackedModel) -> int | None:
    """Positions up to which candidates may share what they begin with; None: any number."""
    if not packed.shares(1):
        return 0
    return packed.together


def _apart_beyond(request: Request, limit: int | None) -> list[Request]:
    longest = len(request.prompt) + max(len(choice) for choice in request.choices) - 1
    return [request] if limit is None or longest <= limit else _each_alone(request)
