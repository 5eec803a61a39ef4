"""Many small models learn side by side on one card: of each, a step of learning and one of evaluating is a CUDA graph.

A model of 22 million values and 16 small pictures leaves a card waiting for the next of thousands of short kernels.
So every kind of run has a lane: its model, its optimizer, tables of the pictures and rates of all steps, and two
graphs that read their place from a counter on the card. The host only says "again", to all lanes in turn; runs of
one lane follow each other in the same memory. Without a card the same functions are called as they are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from dense_arms import WEIGHTS, Builder, Kind, start
from dense_data import Data
from dense_metrics import SIZES, score, sums

DECODER_RATE, ASKED = 2e-3, 50  # pictures that are evaluated in one step
AHEAD = 3  # steps that wait on the card
Run = Iterator[None]


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        rate: peak learning rate of what it tunes; of decoders where nothing else learns.
        steps: of learning.
        weights: place in `WEIGHTS`.
        seed: of starts and order.
        held_out: learn without the held-out training images, and evaluate on those.
    """

    rate: float
    steps: int
    weights: int = 0
    seed: int = 0
    held_out: bool = False


def factor(step: int, steps: int) -> float:
    """Of the peak rate: up for a twentieth of all steps, then down as a cosine."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Lane:
    """The model of a kind, and its runs.

    Args:
        kind: what it learns.
        builder: of its host.
        data: pictures and maps.
        batch: pictures a step.
        most: steps of the longest run.
        seeds: starts that are made beforehand.
    """

    def __init__(
        self, kind: Kind, builder: Builder, data: Data, batch: int, most: int, seeds: int
    ) -> None:
        self.kind, self._data, self._batch = kind, data, batch
        self.chosen: dict[str, Any] | None = None
        # Nothing is dropped in any case; otherwise the host would keep decoders as they are when it is first asked.
        self.host = builder.host(kind).train(True)
        card = data.device.type == "cuda"
        self._stream = torch.cuda.Stream() if card else None
        self._waiting: deque[Any] = deque()
        trained = self.host.adapter.trained()
        self._learned = list(trained.values())
        remember_slots(self.host.adapter.routing)
        self._make_optimizer(trained)
        self._make_tables(max(most, 8))
        self._starts = []
        for seed in range(seeds):
            start(self.host, seed)
            self._starts.append([tensor.detach().clone() for tensor in self._learned])
        self._train: Callable[[], None] = self._learn
        self._answer: Callable[[], None] = self._evaluate

    def _make_optimizer(self, trained: dict[str, Any]) -> None:
        decoders = [t for name, t in trained.items() if name.startswith("decoder:")]
        others = [t for name, t in trained.items() if not name.startswith("decoder:")]
        self.values = {
            "encoder": sum(t.numel() for t in others),
            "decoders": sum(t.numel() for t in decoders),
        }
        self._alone = not others
        device, card = self._data.device, self._data.device.type == "cuda"
        self._peaks = [torch.zeros((), device=device) for some in (decoders, others) if some]
        groups = [
            {"params": some, "lr": torch.zeros((), device=device)}
            for some in (decoders, others)
            if some
        ]
        how: dict[str, Any] = (
            {"fused": True, "capturable": True} if card else {"foreach": False, "fused": False}
        )
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.01, **how)

    def _make_tables(self, most: int) -> None:
        device, data = self._data.device, self._data
        self._count = torch.zeros(1, dtype=torch.long, device=device)
        self._numbers = torch.zeros(most, self._batch, dtype=torch.long, device=device)
        self._flips = torch.zeros(most, self._batch, dtype=torch.bool, device=device)
        self._factors = torch.zeros(most, device=device)
        self._weights = torch.ones(len(self.kind.tasks), device=device)
        self.loss = torch.zeros((), device=device)
        most_asked = max(len(data.test), len(data.held))
        self._each = min(ASKED, most_asked)
        places = -(-most_asked // self._each)
        self._asked = torch.zeros(places, self._each, dtype=torch.long, device=device)
        self._stats = {
            task: torch.zeros(places, self._each, SIZES[task], device=device)
            for task in self.kind.tasks
        }

    # The two steps: all that they read and write lies on the card.

    def _learn(self) -> None:
        tasks, at = self.kind.tasks, self._count
        self._optimizer.zero_grad(set_to_none=True)
        numbers, flips = self._numbers[at].flatten(), self._flips[at].flatten()
        losses = self.host.losses(self._data.batch(numbers, tasks, flips))
        loss = (losses.view(-1, len(tasks)) * self._weights).mean()
        loss.backward()
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"].copy_((peak * self._factors[at]).squeeze())
        torch.nn.utils.clip_grad_norm_(self._learned, 1.0)
        self._optimizer.step()
        self.loss.copy_(loss.detach())
        self._count.add_(1)

    @torch.no_grad()
    def _evaluate(self) -> None:
        tasks, at = self.kind.tasks, self._count
        batch = self._data.batch(self._asked[at].flatten(), tasks)
        answers = self.host.answers(batch, list(range(len(tasks))))
        for number, task in enumerate(tasks):
            found = sums(task, answers[number], batch.targets[number])
            self._stats[task].index_copy_(0, at, found[None])
        self._count.add_(1)

    # Runs.

    def begin(self, job: Job) -> None:
        """The start of a run: weights, an optimizer that has seen nothing, and the tables."""
        data, steps = self._data, job.steps
        pool = data.kept if job.held_out else data.train
        generator = np.random.default_rng([job.seed, 5])
        rounds = -(-steps * self._batch // len(pool))
        order = np.concatenate([generator.permutation(pool) for _ in range(rounds)])
        numbers = order[: steps * self._batch].reshape(steps, self._batch)
        flips = generator.random(numbers.shape) < 0.5
        with self._on_stream(), torch.no_grad():
            torch._foreach_copy_(self._learned, self._starts[job.seed])
            for state in self._optimizer.state.values():
                for value in state.values():
                    value.zero_()
            self._numbers[:steps].copy_(torch.from_numpy(numbers))
            self._flips[:steps].copy_(torch.from_numpy(flips))
            self._factors[:steps].copy_(torch.tensor([factor(s, steps) for s in range(steps)]))
            weights = [WEIGHTS[job.weights][task] for task in self.kind.tasks]
            # One task's weight would only change what clipping sees.
            self._weights.copy_(torch.tensor(weights if len(weights) > 1 else [1.0]))
            peaks = [job.rate if self._alone else DECODER_RATE, job.rate]
            for tensor, value in zip(self._peaks, peaks, strict=False):
                tensor.fill_(value)
            self._count.zero_()

    def run(self, job: Job, into: list[dict[str, Any]]) -> Run:
        """Learn and evaluate; the answer is put into a list. At each `yield` others may go on."""
        self.begin(job)
        for _ in range(job.steps):
            yield from self._again(self._train)
        numbers = self._data.held if job.held_out else self._data.test
        with self._on_stream():
            self._asked.view(-1)[: len(numbers)].copy_(torch.from_numpy(numbers))
            self._count.zero_()
        for _ in range(-(-len(numbers) // self._each)):
            yield from self._again(self._answer)
        yield from self._done(0)
        with self._on_stream():
            stats = {
                task: own.view(-1, own.shape[-1])[: len(numbers)].cpu().numpy()
                for task, own in self._stats.items()
            }
        told = {"arm": self.kind.arm, "tasks": self.kind.tasks, **asdict(job)}
        into.append({"job": told, "values": self.values, "stats": stats})

    def _again(self, step: Callable[[], None]) -> Run:
        yield from self._done(AHEAD)
        with self._on_stream():
            step()
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record(self._stream)
            self._waiting.append(event)
        yield

    def _done(self, left: int) -> Run:
        """Wait until no more than so many steps wait on the card."""
        while len(self._waiting) > left:
            if self._waiting[0].query():
                self._waiting.popleft()
            else:
                yield

    def _on_stream(self) -> Any:
        return torch.cuda.stream(self._stream)

    # Graphs.

    def capture(self) -> float:
        """Make graphs of the two steps.

        Returns:
            How far the loss after three steps by the graph is from that of the same steps without, relatively.

        Raises:
            RuntimeError: something in a step cannot be captured.
        """
        assert self._stream is not None
        job = Job(1e-4, 8)
        torch.cuda.synchronize()
        self.begin(job)
        with self._on_stream():
            for _ in range(3):
                self._learn()
            plain = float(self.loss)
        self._train = self._captured(self._learn)
        with self._on_stream():
            self._count.zero_()
            self._evaluate()
        self._answer = self._captured(self._evaluate)
        self.begin(job)
        with self._on_stream():
            for _ in range(3):
                self._train()
            return abs(float(self.loss) - plain) / abs(plain)

    def _captured(self, step: Callable[[], None]) -> Callable[[], None]:
        assert self._stream is not None
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with self._on_stream():
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        return graph.replay


def remember_slots(routing: Any) -> None:
    """Let a routing look up what it has once said of ids and shapes: it would copy it to the card anew."""
    plain, found = routing.slots, {}

    def slots(shape: Any, device: Any) -> Any:
        now = routing._require()
        key = (now.ids.numpy().tobytes(), tuple(now.ids.shape), now.windows, tuple(shape), device)
        if key not in found:
            found[key] = plain(shape, device)
        return found[key]

    routing.slots = slots


def together(runs: Sequence[Run]) -> None:
    """All runs in turn, until all have ended."""
    active = list(runs)
    while active:
        active = [run for run in active if next(run, run) is not run]


# What a lane lives through.


def tuned(lane: Lane, steps: int, into: list[dict[str, Any]]) -> Iterator[None]:
    """Look for the rate, then for the weights of losses, each on the held-out pictures; said in `lane.chosen`."""
    tried: dict[tuple[float, int], float] = {}

    def trial(rate: float, weights: int = 0) -> Run:
        found: list[dict[str, Any]] = []
        yield from lane.run(Job(rate, steps, weights, held_out=True), found)
        tried[rate, weights] = score(found[0]["stats"])
        into.append(found[0])

    for rate in lane.kind.rates:
        yield from trial(rate)
    for _ in range(4):  # beyond an edge
        rates = sorted(rate for rate, _ in tried)
        best = max(tried, key=lambda key: tried[key])[0]
        if best not in (rates[0], rates[-1]):
            break
        yield from trial(best / 2 if best == rates[0] else best * 2)
    best = max(tried, key=lambda key: tried[key])[0]
    if len(lane.kind.tasks) > 1:
        for weights in range(1, len(WEIGHTS)):
            yield from trial(best, weights)
    chosen = max(tried, key=lambda key: tried[key])
    rates = sorted(rate for rate, _ in tried)
    at_edge = best in (rates[0], rates[-1])
    lane.chosen = {"rate": best, "weights": chosen[1], "edge": at_edge, "rates": sorted(set(rates))}


def life(
    lane: Lane,
    others: dict[Kind, Lane],
    steps: int,
    seeds: int,
    trials: list[dict[str, Any]],
    answers: list[dict[str, Any]],
) -> Run:
    """Trials of half the length, or another lane's choice; then a run of each seed."""
    if lane.kind.like is None:
        yield from tuned(lane, max(1, steps // 2), trials)
    else:
        while others[lane.kind.like].chosen is None:
            yield
        lane.chosen = others[lane.kind.like].chosen
    chosen = lane.chosen
    assert chosen is not None
    for seed in range(seeds):
        yield from lane.run(Job(chosen["rate"], steps, chosen["weights"], seed), answers)
