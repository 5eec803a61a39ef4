"""Rows that grow by one token a step, through transformers' own model.

What is right is each row by itself, whole, at every step. Two things are faster: rows together, filled up
on the left to one length, and a cache of what the tokens before have left. Some models take neither as
they should: their state runs over what fills a row up, or their cache keeps something else. So both are
tried on the first prompts, for three steps, and taken where they say the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor

from mtl_lora_cli.evaluation.choices import Request
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.plain import Layout
from mtl_lora_cli.models.stand_in import dtype_of
from mtl_lora_cli.models.trust import ROUNDING, Difference

_STEPS = 3
_CACHES = ("past_key_values", "cache_params")  # what transformers' models call it


@dataclass(frozen=True)
class Manner:
    """How rows are continued.

    Attributes:
        layout: which go together: `packed`, any, filled up on the left; `rows`, those of one length;
            `single`, none.
        cached: the model's cache is used. Otherwise every step reads the rows from their first token.
    """

    layout: Layout
    cached: bool


ALONE_ANEW = Manner("single", False)
_SLOWER: dict[Layout, tuple[Manner, ...]] = {
    "packed": (Manner("packed", True), Manner("rows", True), Manner("rows", False)),
    "rows": (Manner("rows", True), Manner("rows", False)),
    "single": (Manner("single", True), ALONE_ANEW),
}


class ContinuedRows:
    """Rows of tokens behind which the model is asked, again and again.

    Args:
        model: transformers' own.
        prompts: tokens of each; those that are shorter are filled up on the left.
        device: the model's.
        cached: use the model's cache.

    Raises:
        AttributeError: by `logits`: the model has no cache.
    """

    def __init__(
        self, model: Any, prompts: Sequence[list[int]], device: torch.device, *, cached: bool
    ) -> None:
        longest = max(len(prompt) for prompt in prompts)
        gaps = [longest - len(prompt) for prompt in prompts]
        rows = [[0] * gap + prompt for gap, prompt in zip(gaps, prompts, strict=True)]
        mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
        self._model = model
        self._known = signature(model.forward).parameters
        self._ids = torch.tensor(rows, device=device)
        self._mask = torch.tensor(mask, device=device)
        self._filled_up = any(gaps)
        self._cache_name = next((name for name in _CACHES if name in self._known), _CACHES[0])
        self._cache: Any = None
        self._cached = cached

    def logits(self) -> Tensor:
        """Behind each row as it stands, [B, V]."""
        wanted: dict[str, Any] = {"logits_to_keep": 1}
        if self._filled_up:  # otherwise a model counts its positions as it likes
            places = (self._mask.cumsum(dim=1) - 1).clamp(min=0)
            wanted["position_ids"] = places[:, -self._ids.shape[1] :]
            wanted["attention_mask"] = self._mask
        if self._cached:
            wanted[self._cache_name] = self._cache
        out = self._model(
            input_ids=self._ids,
            use_cache=self._cached,
            **{name: value for name, value in wanted.items() if name in self._known},
        )
        if self._cached:
            self._cache = getattr(out, self._cache_name)
        return cast(Tensor, out.logits[:, -1])

    def add(self, tokens: Tensor) -> None:
        """One token, int64 [B], at the end of each row."""
        new = tokens[:, None]
        self._ids = new if self._cached else torch.cat([self._ids, new], dim=1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(new.shape)], dim=1)


def find_manner(packed: PackedModel, requests: Sequence[Request], device: torch.device) -> Manner:
    """The fastest manner that says of the first prompts what each says by itself."""
    layout: Layout = "packed" if packed.plain is None else packed.plain.way.layout
    *faster, slowest = _SLOWER[layout]
    if not requests:
        return slowest
    longest = max(requests, key=lambda request: len(request.prompt))
    dtype = dtype_of(packed.model)
    with packed.over_rows(longest.task) as model:
        for manner in faster:
            prompts = list(_tried(longest.prompt, manner))
            if _difference(model, prompts, manner, device).within(dtype, ROUNDING):
                return manner
    return slowest


def _tried(prompt: list[int], manner: Manner) -> Iterator[list[int]]:
    """Prompts that go together in this manner: of two lengths, of one, or one alone."""
    yield prompt
    if manner.layout == "packed":
        yield prompt[len(prompt) // 2 :]
    elif manner.layout == "rows":
        yield prompt[::-1]


def _difference(
    model: Any, prompts: Sequence[list[int]], manner: Manner, device: torch.device
) -> Difference:
    """Between a few steps in this manner and each row by itself, whole; infinite where it fails."""
    together = ContinuedRows(model, prompts, device, cached=manner.cached)
    alone = [ContinuedRows(model, [prompt], device, cached=False) for prompt in prompts]
    largest = divergence = 0.0
    for _ in range(_STEPS):
        right = torch.cat([row.logits() for row in alone]).float().log_softmax(dim=-1)
        try:
            found = together.logits().float().log_softmax(dim=-1)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model's code does with a cache
            return Difference(float("inf"), float("inf"))
        largest = max(largest, float((right - found).abs().max()))
        divergence = max(divergence, float((right.exp() * (right - found)).sum(dim=-1).max()))
        likeliest = right.argmax(dim=-1)
        together.add(likeliest)
        for number, row in enumerate(alone):
            row.add(likeliest[number : number + 1])
    return Difference(largest, divergence)
