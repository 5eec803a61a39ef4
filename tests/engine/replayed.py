"""Gradients of mixtures in bfloat16 beside float64, with every position at the experts that bfloat16 asked.

Rounding moves a router's scores; where two are close, another expert is asked, and gradients jump. So what
a run chose is written down, and transformers' routers are given it in the place of their own choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mtl_lora_cli.engine import experts_block
from mtl_lora_cli.models.packed import PackedModel

from .double import alone, examples, in_double, in_dtype, packed_row

Gradients = dict[str, Tensor]


@dataclass
class Choices:
    """Which experts the fused engine asked, a layer each, int64 [M, k]; in the last layer of asked positions alone."""

    layers: list[Tensor] = field(default_factory=list)

    @contextmanager
    def written_down(self) -> Iterator[None]:
        """What the routers choose is kept here."""
        own = experts_block.choose

        def choose(h: Tensor, weights: Any, plan: Any, pairs: Any = None) -> Any:
            choice = own(h, weights, plan, pairs)
            if pairs is None:
                self.layers.append(choice.chosen.cpu())
            return choice

        with mock.patch.object(experts_block, "choose", choose):
            yield

    @contextmanager
    def asked_again(self, lengths: list[int], asked: Tensor) -> Iterator[None]:
        """transformers' routers, which call `torch.topk` once, find these experts, example by example."""
        ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
        turns = [
            _of_example(chosen, start, end, asked)
            for start, end in pairwise(ends)
            for chosen in self.layers
        ]

        def topk(x: Tensor, k: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            places = turns.pop(0).to(x.device).view(*x.shape[:-1], k)
            return x.gather(-1, places), places

        with mock.patch.object(torch, "topk", topk):
            yield
        assert not turns


def _of_example(chosen: Tensor, start: int, end: int, asked: Tensor) -> Tensor:
    """Of positions from `start` to `end`; whom nothing is asked of takes the first experts."""
    if len(chosen) != len(asked):
        return chosen[start:end]
    found = torch.arange(chosen.shape[1]).repeat(end - start, 1)
    inside = (asked >= start) & (asked < end)
    found[asked[inside] - start] = chosen[inside]
    return found


@dataclass(frozen=True)
class Distances:
    """How far gradients of adapters on experts are, |g − g'| / |g'|.

    Attributes:
        own: ours in bfloat16 from float64's, which asks whom it likes.
        replayed: ours in bfloat16 from float64's with our choices.
        theirs: transformers' in bfloat16 from float64's, both with our choices.
    """

    own: float
    replayed: float
    theirs: float


def distances(packed: PackedModel, tensors: Mapping[str, Tensor], bare: Any) -> Distances:
    """See `Distances`.

    Args:
        packed: the adapted model in bfloat16, on the fused engine.
        tensors: its adapters.
        bare: the same model without, in bfloat16.
    """
    some, choices = examples(), Choices()
    batch = packed_row(some)
    here = batch.to(next(bare.parameters()).device)
    with choices.written_down(), packed.routed(here):
        _weighed(packed(here)).backward()
    ours = {k: t.grad for k, t in tensors.items() if ".experts." in k and t.grad is not None}
    lengths = [len(tokens) for tokens, _ in some]

    def right(dtype: torch.dtype, *, replay: bool) -> Gradients:
        model = in_dtype(bare, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        leaves = {k: t.detach().to(wide).requires_grad_() for k, t in tensors.items()}
        again = choices.asked_again(lengths, batch.positions) if replay else nullcontext()
        with again, in_double():
            _weighed(alone(model, leaves, some)).backward()
        return {k: leaves[k].grad for k in ours}  # type: ignore[misc]

    theirs = right(torch.bfloat16, replay=True)  # first: what is rounded is not made exact again
    exact, free = (right(torch.float64, replay=replay) for replay in (True, False))
    return Distances(_far(ours, free), _far(ours, exact), _far(theirs, exact))


def _weighed(logprobs: Tensor) -> Tensor:
    wide = logprobs.double()
    return (wide * torch.linspace(1, 2, len(wide), dtype=wide.dtype, device=wide.device)).sum()


def _far(some: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    a, b = (torch.cat([one[k].double().cpu().flatten() for k in right]) for one in (some, right))
    return float((a - b).norm() / b.norm())
