"""What is to be answered by one token after the other, and how the next token is picked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from mtl_lora_cli.data.pictured import Eyes
from mtl_lora_cli.errors import NoNumbersError
from mtl_lora_cli.evaluation.scored import NO_NUMBERS
from mtl_lora_cli.pictures.shown import Picture

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

    def uniforms(self, request: int, answer: int) -> Iterator[float]:
        """Numbers in [0, 1), one for each token of an answer.

        Args:
            request: its number among those that are answered now.
            answer: its number among those to the request.
        """
        generator = np.random.default_rng([self.seed, self.first + request, answer])
        while True:
            yield from generator.random(64).tolist()


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted.

    Attributes:
        prompt: tokens.
        task: its id, or −1: the base model alone.
        limit: the most tokens that it may have.
        stopped: whether an answer is complete as it stands.
        temperature: 0: the likeliest tokens.
        uniforms: numbers in [0, 1) that tokens are drawn by, where there is a temperature.
        pictures, eyes: what stands in the prompt, and what the model sees of it.
    """

    prompt: list[int]
    task: int
    limit: int
    stopped: Stopped = lambda answer: False
    temperature: float = 0.0
    uniforms: Iterator[float] | None = None
    pictures: tuple[Picture, ...] = ()
    eyes: Eyes | None = None

    @property
    def cost(self) -> int:
        """Places that prompt and answer take."""
        return len(self.prompt) + self.limit


class Prompted(Protocol):
    """What has a prompt to be answered, such as a `choices.Request`."""

    @property
    def prompt(self) -> list[int]: ...

    @property
    def task(self) -> int: ...

    @property
    def pictures(self) -> tuple[Picture, ...]: ...

    @property
    def eyes(self) -> Eyes | None: ...


def asks_of(
    requests: Sequence[Prompted],
    limits: Sequence[int],
    stopped: Stopped,
    sampling: Sampling | None,
) -> list[Ask]:
    """What is asked of prompts with their tasks; of several answers each prompt's stand together."""
    likeliest = [
        Ask(one.prompt, one.task, limit, stopped, pictures=one.pictures, eyes=one.eyes)
        for one, limit in zip(requests, limits, strict=True)
    ]
    if sampling is None or not sampling.temperature:
        return likeliest
    warm, count = sampling.temperature, sampling.answers
    return [
        replace(ask, temperature=warm, uniforms=sampling.uniforms(number, answer))
        for number, ask in enumerate(likeliest)
        for answer in range(count)
    ]


def require_numbers(logits: Tensor) -> None:
    """Refuse to answer by what is no number: the likeliest of NaN is any token.

    Raises:
        NoNumbersError: logits [B, V] of a row have NaN or ∞ among them, or nothing but −∞.
    """
    wrong = int((~finite(logits)).sum())
    if wrong:
        raise no_numbers(wrong, len(logits))


def finite(logits: Tensor) -> Tensor:
    """Which rows of logits [B, V] have a likeliest token, bool [B]."""
    return logits.amax(dim=-1).isfinite()


def no_numbers(wrong: int, among: int) -> NoNumbersError:
    """The error of so many prompts among those that were asked together."""
    return NoNumbersError(
        f"the model finds no finite logits behind {wrong:,} of {among:,} prompts that were asked together: "
        f"{NO_NUMBERS}"
    )


def pick(logits: Tensor, asks: Sequence[Ask]) -> Tensor:
    """The next token of each, int64 [B], from logits [B, V]."""
    warm = [row for row, ask in enumerate(asks) if ask.temperature]
    if not warm:
        return logits.argmax(dim=-1)
    uniforms = [next(cast(Iterator[float], asks[row].uniforms)) for row in warm]
    temperatures = [asks[row].temperature for row in warm]
    if len(warm) == len(asks):
        return drawn(logits, temperatures, uniforms)
    picked = logits.argmax(dim=-1)
    at = torch.tensor(warm, device=logits.device)
    picked[at] = drawn(logits[at], temperatures, uniforms)
    return picked


def drawn(logits: Tensor, temperatures: Sequence[float], uniforms: Sequence[float]) -> Tensor:
    """One token a row, int64 [B], for logits [B, V]: the first whose summed probability exceeds u."""
    both = torch.tensor([temperatures, uniforms], dtype=torch.float64).to(logits.device)
    warmth, bounds = both.unsqueeze(-1)
    likely = (logits.double() / warmth).softmax(dim=-1).cumsum(dim=-1)
    below = (likely <= bounds * likely[:, -1:]).sum(dim=-1)
    return below.clamp(max=logits.shape[-1] - 1)
