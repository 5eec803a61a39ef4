"""Generated answers: what the model says when nobody offers it candidates, the likeliest or a drawn one.

Answers to any tasks are given together. Where the fused engine runs, and says what transformers says of the
first prompts, rows grow on it (`refilled.py`). Elsewhere prompts go through transformers' own model
together, and its cache keeps what they leave, as far as that changes no answer (`continuing.py`). Either way
each further token costs one position a row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from mtl_lora_cli.engine.rows import KeptRows, obstacle_to_rows
from mtl_lora_cli.engine.step_group import ups_bytes
from mtl_lora_cli.evaluation.asked import Ask, Sampling, Stopped, asks_of, pick, require_numbers
from mtl_lora_cli.evaluation.choices import Advance, fill_passes
from mtl_lora_cli.evaluation.continuing import (
    ALONE_ANEW,
    ContinuedRows,
    Manner,
    find_manner,
    fused_agrees,
)
from mtl_lora_cli.evaluation.refilled import answer_refilled, batches
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.machine.processes import ALONE, Processes
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.stand_in import dtype_of
from mtl_lora_cli.tasks.reading import Reading

__all__ = ["Reading", "answer_all", "generate"]

_MOST_UPS = 2**30  # bytes of tasks' own matrices that are made at once


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
        tokens_per_pass: rows that grow together have up to so many places.
        stopped: whether an answer is complete as it stands.
        advance: called with the number of this process's answers done since the last call.
        processes: this process among those that answer the same requests together.
        sampling: draw; of several answers each prompt's stand one after another. None: the likeliest tokens.

    Returns:
        Tokens of each answer.
    """
    return answer_all(
        packed,
        asks_of(requests, new_tokens, stopped, sampling),
        ends=ends,
        device=device,
        tokens_per_pass=tokens_per_pass,
        advance=advance,
        processes=processes,
    )


def answer_all(
    packed: PackedModel,
    asks: Sequence[Ask],
    *,
    ends: Collection[int],
    device: torch.device,
    tokens_per_pass: int,
    advance: Advance = lambda done: None,
    processes: Processes = ALONE,
) -> list[list[int]]:
    """Tokens of each answer that is asked for, of any tasks; the arguments are those of `generate`."""
    own = {number: asks[number] for number in processes.share([ask.cost for ask in asks])}
    answers: dict[int, list[int]] = {}
    training = packed.training
    if training:
        packed.eval()
    try:
        with torch.inference_mode():
            here = _on_the_engine(packed, own, device)
            rest = {number: ask for number, ask in own.items() if number not in here}
            if here:
                answers |= _fused(packed, here, ends, device, tokens_per_pass, advance)
            if rest:
                answers |= _by_transformers(packed, rest, ends, device, tokens_per_pass, advance)
    finally:
        if training:
            packed.train()
    return processes.collect(answers)


def _on_the_engine(
    packed: PackedModel, asks: Mapping[int, Ask], device: torch.device
) -> dict[int, Ask]:
    """Those that the fused engine answers: all without pictures that are short enough for its rotary embedding,
    or none."""
    if (
        not asks
        or packed.decoder is None
        or (packed.vision is not None and packed.vision.whole_prompt)
        or obstacle_to_rows(packed.decoder, packed.head) is not None
    ):
        return {}
    limit = packed.together
    found = {
        n: ask
        for n, ask in asks.items()
        if not ask.pictures and (limit is None or ask.cost <= limit)
    }
    return found if found and fused_agrees(packed, list(found.values()), device) else {}


def _fused(
    packed: PackedModel,
    asks: Mapping[int, Ask],
    ends: Collection[int],
    device: torch.device,
    tokens_per_pass: int,
    advance: Advance,
) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for some in _few_tasks(packed, asks):
        tasks = {ask.task for ask in some.values()}
        for batch in batches(some, tokens_per_pass, device):
            kept = _kept_rows(packed, tasks, batch.rows, batch.length)
            found |= answer_refilled(kept, some, batch.numbers, ends=ends, advance=advance)
    return found


def _few_tasks(packed: PackedModel, asks: Mapping[int, Ask]) -> Iterator[dict[int, Ask]]:
    """Requests of as many tasks as may have their matrices made at once."""
    assert packed.decoder is not None
    each = ups_bytes(packed.decoder, dtype_of(packed.model))
    most = max(1, _MOST_UPS // max(1, each))
    tasks = sorted({ask.task for ask in asks.values()})
    for start in range(0, len(tasks), most):
        some = set(tasks[start : start + most])
        yield {number: ask for number, ask in asks.items() if ask.task in some}


def _kept_rows(packed: PackedModel, tasks: set[int], rows: int, length: int) -> KeptRows:
    """Rows to grow, those of the last time where they fit: their graphs are recorded already."""
    assert packed.decoder is not None
    kept: KeptRows | None = packed.kept_rows
    if kept is not None and kept.fits(tasks, rows, length):
        kept.learn()
        return kept
    packed.kept_rows = None  # its memory is free before the next one's is asked for
    limit = packed.together
    rounded = -(-length // 64) * 64
    packed.kept_rows = kept = KeptRows(
        packed.decoder,
        packed.head,
        sorted(tasks),
        1 << (rows - 1).bit_length(),
        rounded if limit is None else min(rounded, limit),
    )
    return kept


def _by_transformers(
    packed: PackedModel,
    asks: Mapping[int, Ask],
    ends: Collection[int],
    device: torch.device,
    tokens_per_pass: int,
    advance: Advance,
) -> dict[int, list[int]]:
    answers: dict[int, list[int]] = {}
    for part in _by_sight(asks):
        manner = find_manner(packed, list(part.values()), device)
        for numbers, how in _passes(packed, manner, part, tokens_per_pass):
            some = [asks[number] for number in numbers]
            tasks = [ask.task for ask in some]
            with packed.over_rows(torch.tensor(tasks) if how.mixed else tasks[0]) as model:
                rows = ContinuedRows(model, some, device, cached=how.cached)
                found = _continued(rows, some, ends)
            answers.update(zip(numbers, found, strict=True))
            advance(len(numbers))
    return answers


def _by_sight(asks: Mapping[int, Ask]) -> list[dict[int, Ask]]:
    """Those without pictures, and those with some, as far as there are any."""
    parts: tuple[dict[int, Ask], dict[int, Ask]] = {}, {}
    for number, ask in asks.items():
        parts[bool(ask.pictures)][number] = ask
    return [part for part in parts if part]


def _passes(
    packed: PackedModel, manner: Manner, asks: Mapping[int, Ask], tokens_per_pass: int
) -> Iterator[tuple[list[int], Manner]]:
    """Numbers of the requests that are answered together, and how.

    Where another row's length could change an answer, or state would run over what fills a row up, only
    prompts of one length are; where even rows of one length could, or the rotary embedding may change
    on the way, each is answered by itself.
    """
    limit = packed.together
    groups: dict[tuple[int | None, int, Manner], list[int]] = {}
    for number, ask in asks.items():
        beyond = limit is not None and ask.cost > limit
        how = ALONE_ANEW if beyond else manner
        alike = {"packed": 0, "rows": len(ask.prompt), "single": number}[how.layout]
        groups.setdefault((None if how.mixed else ask.task, alike, how), []).append(number)
    for (_, _, how), group in groups.items():
        for some in fill_passes([asks[number].cost for number in group], tokens_per_pass):
            yield [group[place] for place in some], how


def _continued(rows: ContinuedRows, asks: Sequence[Ask], ends: Collection[int]) -> list[list[int]]:
    """What follows each prompt: one token after the other, until all are complete."""
    answers: list[list[int]] = [[] for _ in asks]
    going = [ask.limit > 0 for ask in asks]
    while any(going):
        logits = rows.logits()
        require_numbers(logits if all(going) else logits[torch.tensor(going)])
        picked = pick(logits, asks)
        for row, (token, ask) in enumerate(zip(picked.tolist(), asks, strict=True)):
            if not going[row]:
                continue
            if token not in ends:
                answers[row].append(token)
            going[row] = not (
                token in ends or len(answers[row]) >= ask.limit or ask.stopped(answers[row])
            )
        rows.add(picked)
    return answers
