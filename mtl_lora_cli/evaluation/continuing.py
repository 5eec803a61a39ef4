"""Rows that grow by one token a step, through transformers' own model, and what else says the same.

What is right is each row by itself, whole, at every step. Two things are faster: rows together, filled up
on the left to one length, and a cache of what the tokens before have left. Some models take neither as
they should: their state runs over what fills a row up, or their cache keeps something else. Rows of
several tasks together are faster still, where a model's code leaves rows where they are. So all is
tried on the longest prompts, for three steps, and taken where it says the same; so is the fused engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from mtl_lora_cli.engine.rows import KeptRows
from mtl_lora_cli.evaluation.asked import Ask
from mtl_lora_cli.machine import threads
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.plain import Layout
from mtl_lora_cli.models.side_by_side import ROUNDING, Difference
from mtl_lora_cli.models.sight import tower_dtype
from mtl_lora_cli.models.stand_in import dtype_of
from mtl_lora_cli.visible import tell

_STEPS = 3
_CACHES = ("past_key_values", "cache_params")  # what transformers' models call it


@dataclass(frozen=True)
class Manner:
    """How rows are continued.

    Attributes:
        layout: which go together: `packed`, any, filled up on the left; `rows`, those of one length;
            `single`, none.
        cached: the model's cache is used. Otherwise every step reads the rows from their first token.
        mixed: rows of several tasks go together.
    """

    layout: Layout
    cached: bool
    mixed: bool = False


ALONE_ANEW = Manner("single", False)
_SLOWER: dict[Layout, tuple[Manner, ...]] = {
    "packed": (
        Manner("packed", True, True),
        Manner("packed", True),
        Manner("rows", True),
        Manner("rows", False),
    ),
    "rows": (Manner("rows", True), Manner("rows", False)),
    "single": (Manner("single", True), ALONE_ANEW),
}


class ContinuedRows:
    """Rows of tokens behind which the model is asked, again and again.

    Args:
        model: transformers' own.
        asks: prompts; those that are shorter are filled up on the left. One with pictures is alone.
        device: the model's.
        cached: use the model's cache.

    Raises:
        AttributeError: by `logits`: the model has no cache.
    """

    def __init__(
        self, model: Any, asks: Sequence[Ask], device: torch.device, *, cached: bool
    ) -> None:
        prompts = [ask.prompt for ask in asks]
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
        self._shows = next((ask for ask in asks if ask.pictures), None)
        assert self._shows is None or len(asks) == 1, "pictures go with their own prompt alone"

    def logits(self) -> Tensor:
        """Behind each row as it stands, [B, V]."""
        wanted: dict[str, Any] = {"logits_to_keep": 1}
        if self._filled_up:  # otherwise a model counts its positions as it likes
            places = (self._mask.cumsum(dim=1) - 1).clamp(min=0)
            wanted["position_ids"] = places[:, -self._ids.shape[1] :]
            wanted["attention_mask"] = self._mask
        if self._cached:
            wanted[self._cache_name] = self._cache
        wanted.update(self._pictures())
        out = self._model(
            input_ids=self._ids,
            use_cache=self._cached,
            **{name: value for name, value in wanted.items() if name in self._known},
        )
        if self._cached:
            self._cache = getattr(out, self._cache_name)
        return cast(Tensor, out.logits[:, -1])

    def _pictures(self) -> dict[str, Tensor]:
        """What the model takes of them; what a cache keeps of the prompt is not given again."""
        if self._shows is None or self._cache is not None:
            return {}
        eyes = self._shows.eyes
        assert eyes is not None, "who shows pictures says how they are seen"
        seen = eyes.looked(self._shows.pictures)
        shown = self._ids.cpu() == eyes.vision.token_id
        given = eyes.vision.alone(seen, shown, len(self._shows.prompt))
        on, wide = self._ids.device, tower_dtype(self._model)
        return {n: v.to(on, wide if v.is_floating_point() else None) for n, v in given.items()}

    def add(self, tokens: Tensor) -> None:
        """One token, int64 [B], at the end of each row."""
        new = tokens[:, None]
        self._ids = new if self._cached else torch.cat([self._ids, new], dim=1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(new.shape)], dim=1)


class _Growing(Protocol):
    def logits(self) -> Tensor: ...

    def add(self, tokens: Tensor) -> None: ...


class _Routed:
    """Rows of transformers' model, each step routed.

    Args:
        packed: the model.
        asks: prompts with their tasks.
        device: the model's.
        cached: use the model's cache.
    """

    def __init__(
        self, packed: PackedModel, asks: Sequence[Ask], device: torch.device, *, cached: bool
    ) -> None:
        tasks = {ask.task for ask in asks}
        self._packed = packed
        self._tasks: Any = (
            tasks.pop() if len(tasks) == 1 else torch.tensor([ask.task for ask in asks])
        )
        self._rows = ContinuedRows(packed.model, asks, device, cached=cached)
        self._device = device

    def logits(self) -> Tensor:
        threads.look(self._device)
        with self._packed.over_rows(self._tasks):
            return self._rows.logits()

    def add(self, tokens: Tensor) -> None:
        self._rows.add(tokens)


class _OnTheEngine:
    """Rows on the fused engine, the prompts among them.

    Args:
        packed: the model.
        asks: prompts with their tasks.
    """

    def __init__(self, packed: PackedModel, asks: Sequence[Ask]) -> None:
        assert packed.decoder is not None
        self._asks = asks
        longest = max(len(ask.prompt) for ask in asks) + _STEPS
        tasks = [ask.task for ask in asks]
        self._kept = KeptRows(packed.decoder, packed.head, tasks, len(asks), longest)
        self._logits = self._kept.begin([ask.prompt for ask in asks], tasks, range(len(asks)))

    def logits(self) -> Tensor:
        return self._logits

    def add(self, tokens: Tensor) -> None:
        rows = range(len(self._asks))
        self._kept.feed(rows, tokens)
        self._logits = self._kept.step(len(rows), often=False)


def find_manner(packed: PackedModel, asks: Sequence[Ask], device: torch.device) -> Manner:
    """The fastest manner that says of the longest prompts what each says by itself."""
    layout: Layout = "packed" if packed.plain is None else packed.plain.way.layout
    if asks[0].pictures:
        layout = "single"
    *faster, slowest = _SLOWER[layout]
    for manner in faster:
        tried = _tried(asks, manner)
        if manner.mixed and len({ask.task for ask in asks}) < 2:
            continue
        grown = lambda: _Routed(packed, tried, device, cached=manner.cached)  # noqa: E731, B023
        if _disagrees(packed, tried, grown, device) is None:
            return manner
    return slowest


def fused_agrees(packed: PackedModel, asks: Sequence[Ask], device: torch.device) -> bool:
    """Whether the fused engine continues the longest prompts as transformers does, each by itself.

    What was found holds for prompts of up to twice the length, on one device.
    """
    longest = max(len(ask.prompt) for ask in asks)
    known: dict[int, bool] = packed.rows_agree
    key = longest.bit_length()
    if key not in known:
        tried = _tried(asks, Manner("packed", True, True))
        why = _disagrees(packed, tried, lambda: _OnTheEngine(packed, tried), device)
        known[key] = why is None
        if why is not None:
            tell(f"note: transformers' own model generates answers; the fused engine: {why}")
    return known[key]


def _tried(asks: Sequence[Ask], manner: Manner) -> list[Ask]:
    """Prompts that go together in this manner: of two lengths, of one, or one alone."""
    longest = max(asks, key=lambda ask: len(ask.prompt))
    if longest.pictures:
        return [replace(longest, limit=_STEPS)]
    prompt, task = longest.prompt, longest.task
    if manner.mixed:
        task = next((ask.task for ask in asks if ask.task != task), task)
    first = Ask(prompt, longest.task, _STEPS)
    if manner.layout == "packed":
        return [first, Ask(prompt[len(prompt) // 2 :], task, _STEPS)]
    if manner.layout == "rows":
        return [first, Ask(prompt[::-1], task, _STEPS)]
    return [first]


def _disagrees(
    packed: PackedModel,
    asks: Sequence[Ask],
    grown: Callable[[], _Growing],
    device: torch.device,
) -> str | None:
    """Why rows together do not say for a few steps what each row says by itself, whole; None: they do."""
    alone = [_Routed(packed, [ask], device, cached=False) for ask in asks]
    try:
        together = grown()
        found = _difference(alone, together)
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ) as error:  # whatever a model's code does with a cache, or with rows of several tasks
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None if found.within(dtype_of(packed.model), ROUNDING) else f"differs by {found}"


def _difference(alone: Sequence[_Growing], together: _Growing) -> Difference:
    largest = divergence = 0.0
    for _ in range(_STEPS):
        right = torch.cat([row.logits() for row in alone]).float().log_softmax(dim=-1)
        found = together.logits().float().log_softmax(dim=-1)
        gap = torch.where(right == found, 0.0, right - found).nan_to_num(nan=float("inf"))
        largest = max(largest, float(gap.abs().max()))
        divergence = max(divergence, float((right.exp() * gap).sum(dim=-1).max()))
        likeliest = right.argmax(dim=-1)
        together.add(likeliest)
        for number, row in enumerate(alone):
            row.add(likeliest[number : number + 1])
    return Difference(largest, divergence)
