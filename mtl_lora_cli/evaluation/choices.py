"""Scoring candidate answers by their log-probability, each prompt computed once.

log p(choice) = Σ_i log p(token_i | prompt, tokens before it). A prompt and its candidates form a tree,
in which candidates share what they begin with. A candidate's last token is only asked for, so that
candidates of one token cost no token of their own: the prompt's last position answers them all.

Where a candidate's tokens begin another's, log p could never be greater for the longer one: `10` is never
likelier than `1`. There every candidate of the row ends with the end token, as training taught it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import chain, pairwise, takewhile
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtl_lora_cli.data.answers import require_apart
from mtl_lora_cli.data.collate import shown_in
from mtl_lora_cli.data.conversation import Prompt
from mtl_lora_cli.data.encoded import latest, shown_by
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.data.pictured import Eyes
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.readout import Readout
from mtl_lora_cli.machine import threads
from mtl_lora_cli.machine.processes import ALONE, Processes
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.pictures.shown import Picture
from mtl_lora_cli.tasks.rendering import Example
from mtl_lora_cli.tasks.task import Task

Advance = Callable[[int], None]
_TOLD_APART = 16  # Triton compiles a kernel for numbers that are multiples of this, and for others


@dataclass(frozen=True)
class Tree:
    """A prompt and its candidates as one segment of n positions, in depth-first order.

    Every position from the prompt's last on answers something, what follows it in some candidate; but those
    that a candidate only passes through (`Request.passed`).

    Attributes:
        tokens, places: int32 [n], and their places in the text.
        reach: int32 [n], see `mtl_lora_cli.engine.segments`.
        owner: int32 [S], for each token of the candidates, one candidate behind the other, the
            position that answers it.
        targets: int32 [S], those tokens.
        lengths: int32 [C], how many of them each candidate has.
        asked: int32 [Q], the positions that answer something, ascending.
    """

    tokens: np.ndarray
    places: np.ndarray
    reach: np.ndarray
    owner: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    asked: np.ndarray

    @classmethod
    def build(
        cls, prompt: list[int], choices: list[list[int]], passed: Sequence[int] | None = None
    ) -> Tree:
        """A prompt's own tokens, and what its candidates add to any prompt."""
        start, own = len(prompt), branches_of(choices, passed)
        count = start + len(own.tokens)
        reach = np.full(count, count, dtype=np.int32)
        inside = own.reach >= 0
        reach[start:][inside] = own.reach[inside] + start
        if passed is None:
            asked = np.arange(start - 1, count, dtype=np.int32)
        else:
            asked = np.unique(own.owner + start).astype(np.int32)
        return cls(
            tokens=np.concatenate([np.asarray(prompt, dtype=np.int32), own.tokens]),
            places=np.concatenate([np.arange(start, dtype=np.int32), own.places + start]),
            reach=reach,
            owner=own.owner + start,
            targets=own.targets,
            lengths=own.lengths,
            asked=asked,
        )


class Branches(NamedTuple):
    """What candidates are behind any prompt, whose last position has the place −1; see `Tree`."""

    tokens: np.ndarray
    places: np.ndarray
    reach: np.ndarray  # −1: up to the end
    owner: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray


def branches_of(choices: Sequence[Sequence[int]], passed: Sequence[int] | None) -> Branches:
    """Of candidates; a task's are the same for most of its rows, and made once."""
    some = tuple(tuple(choice) for choice in choices)
    return _branches(some, None if passed is None else tuple(passed))


@lru_cache(maxsize=512)
def _branches(choices: Sequence[tuple[int, ...]], passed: Sequence[int] | None) -> Branches:
    """Sorted candidates that begin alike stand together, so each adds what the last one lacks."""
    tokens: list[int] = []
    places: list[int] = []
    reach: list[int] = []
    owners: list[list[int]] = [[] for _ in choices]
    path: list[int] = []  # positions of the last candidate's tokens, all but its own last one
    for number, inner, kept in _inner(choices):
        for position in path[kept:]:
            reach[position] = len(tokens)
        added = len(inner) - kept
        path = [*path[:kept], *range(len(tokens), len(tokens) + added)]
        tokens += inner[kept:]
        places += range(kept, len(inner))
        reach += [-1] * added
        owners[number] = [-1, *path][: len(choices[number])]
    if passed is not None:
        owners = [own[count:] for own, count in zip(owners, passed, strict=True)]
        choices = [own[count:] for own, count in zip(choices, passed, strict=True)]
    every = (
        tokens, places, reach, [place for some in owners for place in some],
        [token for some in choices for token in some], [len(some) for some in choices],
    )  # fmt: skip
    return Branches(*(np.asarray(one, dtype=np.int32) for one in every))


def _inner(choices: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """Candidates sorted, each with its tokens but the last, and how many of them the one before has, too."""
    before: tuple[int, ...] = ()
    for number in sorted(range(len(choices)), key=lambda number: choices[number]):
        inner = choices[number][:-1]
        same = zip(before, inner, strict=False)
        yield number, inner, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], same))
        before = inner


@dataclass(frozen=True)
class Request:
    """One example to score.

    Attributes:
        task: task id, or -1 for the base model alone.
        prompt: tokens.
        choices: tokens of each candidate as it follows the prompt, its end included where that counts.
        truncated: the prompt was cut to fit the model's positions.
        ends: how many tokens at the end of each candidate are its end; 0 where the end does not count.
        passed: how many tokens at the beginning of each candidate are no part of it, but of the prompt that
            it alone has behind the common one; None: none of any.
        room: of a conversation, the most tokens that an answer to it may have; 0: it is none.
        pictures: that stand in the prompt, in the order of their tokens.
        eyes: what the model sees of them.
    """

    task: int
    prompt: list[int]
    choices: list[list[int]]
    truncated: bool = False
    ends: int = 0
    passed: list[int] | None = None
    room: int = 0
    pictures: tuple[Picture, ...] = ()
    eyes: Eyes | None = field(default=None, compare=False, repr=False)

    @property
    def with_open(self) -> Request:
        """The same with each candidate without its end behind those with it, where ends count.

        It sends no further token through the model.
        """
        if not self.ends:
            return self
        open_ = [choice[: -self.ends] for choice in self.choices]
        return replace(self, choices=[*self.choices, *open_])

    @cached_property
    def tree(self) -> Tree:
        """How it goes through the model."""
        return Tree.build(self.prompt, self.choices, self.passed)

    @cached_property
    def cost(self) -> int:
        """Tokens that go through the model: of the tree, which need not be there yet."""
        return len(self.prompt) + len(branches_of(self.choices, self.passed).tokens)


def build_requests(
    examples: Sequence[Example],
    task: int,
    encoder: Encoder,
    limit: int,
    *,
    new_tokens: int = 0,
    generated: bool = False,
    wheres: Sequence[str] | None = None,
) -> list[Request]:
    """Tokenise examples for scoring; a free answer is its example's only candidate.

    A prompt that leaves no room for its longest candidate within `limit` positions is cut at its
    beginning, as lm-evaluation-harness does, and marked. Where one candidate begins another, the end
    counts for each of them.

    Args:
        examples: rendered.
        task: task id, or -1 for the base model alone.
        encoder: tokenises.
        limit: positions that the model knows.
        new_tokens: how many more tokens will be generated, where it is more than the candidates have.
        generated: answers will be: then a free one is not known when its prompt is cut.
        wheres: where each example came from, for errors.

    Raises:
        UsageError: there is no room even without the row's own text.
    """
    if any(example.dialogue is not None for example in examples):
        return _of_dialogues(
            examples, task, encoder, limit, new_tokens, generated=generated, wheres=wheres
        )
    eyes = encoder.eyes if any(example.images for example in examples) else None
    places = _places(wheres, len(examples))
    texts = [example.prompt for example in examples]
    shown = None if eyes is None else [example.images for example in examples]
    prompts, answers = encoder.continuations(
        texts,
        [example.choices or (example.answer,) for example in examples],
        wheres=wheres,
        shown=shown,
    )
    if generated and not all(example.choices for example in examples):
        prompts, _ = encoder.continuations(
            texts, [example.choices or ("",) for example in examples], wheres=wheres, shown=shown
        )
    end = list(encoder.answer_end)
    requests = []
    for prompt, choices, where, example in zip(prompts, answers, places, examples, strict=True):
        if eyes is not None:
            prompt = _with_pictures(prompt, choices, example.images, eyes, where)
        counts = one_begins_another(choices)
        asked = [[*choice, *end] for choice in choices] if counts else choices
        room = limit - max(new_tokens, *(len(choice) for choice in asked))
        short = _shortened(prompt, room, limit, where)
        cut = len(short) < len(prompt)
        own = Request(task, short, asked, cut, len(end) if counts else 0)
        requests.append(replace(own, pictures=example.images, eyes=eyes))
    return requests


def _with_pictures(
    prompt: Prompt,
    choices: Sequence[list[int]],
    shown: Sequence[Picture],
    eyes: Eyes,
    where: str,
) -> Prompt:
    """A prompt of which nothing is cut up to its last picture's end.

    Raises:
        UsageError: other picture tokens stand in it or in an answer than those of its pictures.
    """
    every = [*prompt.tokens, *chain.from_iterable(choices)]
    eyes.require_all(every, shown, where.removesuffix(": "))
    return replace(prompt, own=eyes.behind(prompt.tokens, prompt.own))


def _places(wheres: Sequence[str] | None, count: int) -> list[str]:
    """What an error about each example begins with."""
    return [""] * count if wheres is None else [f"{where}: " for where in wheres]


def _shortened(prompt: Prompt, room: int, limit: int, where: str) -> list[int]:
    """A prompt in the room that there is.

    Raises:
        UsageError: there is no room even without the row's own text.
    """
    if prompt.fixed > max(1, room):
        raise UsageError(
            f"{where}the longest answer and what stands around it have {limit - room + prompt.fixed} "
            f"tokens; the model reads {limit}"
        )
    return prompt.shortened(max(1, room))


def room_for(answer: Sequence[int]) -> int:
    """Tokens that an answer to a conversation may have, where there is room: twice the right one's, and 32."""
    return 2 * len(answer) + 32


def _of_dialogues(
    examples: Sequence[Example],
    task: int,
    encoder: Encoder,
    limit: int,
    new_tokens: int,
    *,
    generated: bool,
    wheres: Sequence[str] | None,
) -> list[Request]:
    """Conversations to be answered; a longer one loses its earliest turns, whole, and then of its question."""
    dialogues = [example.dialogue for example in examples if example.dialogue is not None]
    labelled = all(any(one.counts) for one in dialogues)
    every = [shown_by(example) for example in examples]
    eyes = encoder.eyes if any(every) else None
    prompts, answers = encoder.asked(dialogues, known=labelled, shown=every)
    if generated and labelled:
        prompts, _ = encoder.asked(dialogues, known=False, shown=every)
    requests = []
    places = _places(wheres, len(dialogues))
    for dialogue, prompt, answer, shown, where in zip(
        dialogues, prompts, answers, every, places, strict=True
    ):
        wanted = max(new_tokens, len(answer))
        if generated:  # the right answer need not fit: it is only compared with what is said
            wanted = min(new_tokens or room_for(answer), max(limit // 2, limit - len(prompt)))
        room = limit - wanted
        whole, shorter = len(prompt), dialogue.without_earliest()
        while len(prompt) > room and shorter is not None:
            shown = latest(shorter, shown)
            ((prompt,), _) = encoder.asked(
                [shorter], known=labelled and not generated, shown=[shown]
            )
            shorter = shorter.without_earliest()
        if eyes is not None:
            prompt = _with_pictures(prompt, [answer], shown, eyes, where)
        if generated:
            wanted = max(1, min(wanted, limit - prompt.fixed))
        short = _shortened(prompt, limit - wanted, limit, where)
        own = Request(task, short, [answer], len(short) < whole, room=wanted)
        requests.append(replace(own, pictures=shown, eyes=eyes))
    return requests


def one_begins_another(choices: Sequence[list[int]]) -> bool:
    """Whether the tokens of one candidate begin those of another one."""
    return any(
        len(one) < len(other) and other[: len(one)] == one
        for one, other in pairwise(sorted(choices))
    )


def require_different(task: Task, examples: Examples, requests: Sequence[Request]) -> None:
    """Refuse examples of which two candidates have the same tokens.

    Raises:
        UsageError: naming the row and the two.
    """
    for example, where, request in zip(examples.examples, examples.wheres, requests, strict=True):
        require_apart(task.name, where, example.choices, request.choices)


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
