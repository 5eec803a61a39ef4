"""Several tasks over one row: what their prompts share goes through the model once, where that is exact.

An adapter makes the activations of a prompt its task's own. So two tasks share the keys and values of a common
beginning only if the adapter does the same for both: with a method without parts of the tasks' own (`lora`,
`multilora`, `hydralora`), with rows that are equal to the last bit, and where the base model alone is asked. There the row's
requests become one tree: the common beginning, and behind it each task's own end and candidates. All other requests
stay as they are and go through the model together, packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.pictures.shown import Picture


@dataclass(frozen=True)
class Asked:
    """Requests as they go through the model.

    Attributes:
        requests: some of them several in one.
        held: for each of them the numbers of those that it holds, whose candidates stand one after another.
        counts: of each that is held how many candidates it has.
    """

    requests: list[Request]
    held: list[list[int]]
    counts: list[int]

    @property
    def cost(self) -> int:
        """Tokens that go through the model."""
        return sum(request.cost for request in self.requests)

    def apart(self, found: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What was found for each candidate, by the requests that were held: [choices, …] each."""
        parts: dict[int, np.ndarray] = {}
        for numbers, values in zip(self.held, found, strict=True):
            ends = np.cumsum([self.counts[number] for number in numbers])
            parts.update(zip(numbers, np.split(values, ends[:-1]), strict=True))
        return [parts[number] for number in range(len(self.counts))]


def as_they_are(requests: Sequence[Request]) -> Asked:
    """Each alone."""
    counts = [len(request.choices) for request in requests]
    return Asked(list(requests), [[number] for number in range(len(requests))], counts)


def of_one_row(requests: Sequence[Request], rows: Sequence[int], same: Sequence[int]) -> Asked:
    """Requests of one row whose tasks are the same to the adapter as one, where their prompts begin alike.

    Args:
        requests: of any tasks and rows.
        rows: the row of each.
        same: the first task that the adapter does the same for, by task id.
    """
    groups: dict[tuple[int, int, tuple[Picture, ...]], list[int]] = {}
    for number, (request, row) in enumerate(zip(requests, rows, strict=True)):
        kind = same[request.task] if request.task >= 0 else -1
        groups.setdefault((row, kind, request.pictures), []).append(number)
    held: list[list[int]] = []
    for numbers in groups.values():
        if len(numbers) > 1 and _shares([requests[number] for number in numbers]):
            held.append(numbers)
        else:
            held += [[number] for number in numbers]
    made = [_joined([requests[number] for number in numbers]) for numbers in held]
    return Asked(made, held, [len(request.choices) for request in requests])


def same_to(adapter: Adapter | None) -> list[int]:
    """For each task the first one that the adapter does the same for: the same itself as a rule."""
    if adapter is None:
        return []
    own = [tensor for name, tensor in adapter.tensors().items() if adapter.role(name).per_task]
    found: dict[tuple[bytes, ...], int] = {}
    rows = [tensor.detach().cpu().numpy() for tensor in own]
    return [
        found.setdefault(tuple(tensor[task].tobytes() for tensor in rows), task)
        for task in range(len(adapter.tasks))
    ]


def _common(prompts: Sequence[list[int]]) -> int:
    """Tokens with which all of them begin."""
    return sum(
        1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    )


def _shares(requests: Sequence[Request]) -> bool:
    """Whether their prompts begin alike; of prompts with pictures, up to behind the last one."""
    common = _common([request.prompt for request in requests])
    eyes = requests[0].eyes
    if eyes is not None and eyes.vision.whole_prompt:
        return False
    if eyes is None or not requests[0].pictures:
        return common > 0
    return all(eyes.vision.token_id not in request.prompt[common:] for request in requests)


def _joined(requests: Sequence[Request]) -> Request:
    """One tree of requests whose prompts begin alike."""
    if len(requests) == 1:
        return requests[0]
    common = _common([request.prompt for request in requests])
    choices, passed = [], []
    for request in requests:
        own = request.prompt[common:]
        choices += [own + choice for choice in request.choices]
        passed += [len(own)] * len(request.choices)
    first = requests[0]
    made = Request(first.task, first.prompt[:common], choices, passed=passed)
    return replace(made, pictures=first.pictures, eyes=first.eyes)
