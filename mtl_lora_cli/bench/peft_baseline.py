"""What a user of PEFT gets: plain LoRA over padded batches, on the same examples.

transformers' own model with `sdpa` attention, `get_peft_model`, examples in the file's order, each
batch padded to its longest, labels −100 everywhere but on the answer, AdamW. On a card the forward
pass runs under bf16 autocast, as transformers' Trainer does it with `bf16=True`; the 4-bit base is
used as it stands, without `prepare_model_for_kbit_training`, whose float32 norms and head would
make it slower. Padding is computed but never counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.bench.case import Measuring
from mtl_lora_cli.bench.cases import Case
from mtl_lora_cli.bench.rival import STEPS, WARMUP, attempts, mark_best, peft_model, timed
from mtl_lora_cli.bench.shapes import find_config
from mtl_lora_cli.bench.yardstick import Yardstick
from mtl_lora_cli.machine.cards import pick_dtype, release

BATCHES = (8, 16, 32)


@dataclass(frozen=True)
class Padded:
    """One padded batch.

    Attributes:
        input_ids, attention_mask, labels: int64 [B, longest]; labels are −100 where nothing counts.
        tokens: real tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    tokens: int


def padded_batches(yardstick: Yardstick, size: int, count: int) -> list[Padded]:
    """The first `count` batches of `size` examples in the file's order, padded on the right."""
    made = []
    for start in range(0, size * count, size):
        some = [
            yardstick.places[number % len(yardstick.places)]
            for number in range(start, start + size)
        ]
        parts = [torch.from_numpy(yardstick.splits[t].example(n)).long() for t, n in some]
        learned = [yardstick.splits[t].learned(n) for t, n in some]
        shape = (size, max(len(part) for part in parts))
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, -100)
        for row, (part, places) in enumerate(zip(parts, learned, strict=True)):
            ids[row, : len(part)] = part
            mask[row, : len(part)] = 1
            labels[row, places] = part[places]
        made.append(Padded(ids, mask, labels, sum(len(part) for part in parts)))
    return made


def run_all(
    case: Case, measuring: Measuring, done: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Try PEFT's settings: 16-bit and 4-bit base, batches of 8, 16 and 32.

    Gradient checkpointing is tried only where nothing fits without it.

    Args:
        case: whose shape, rank, targets and examples are taken.
        measuring: how; the numbers of steps are PEFT's own.
        done: told of each setting.

    Returns:
        An entry for each setting; the fastest has `best`.
    """
    entries: list[dict[str, Any]] = []
    kinds = ("none", "nf4") if measuring.device.type == "cuda" else ("none",)
    for checkpointing in (False, True):
        for quantization in kinds:
            for entry in _settings(case, measuring, quantization, checkpointing):
                entries.append(entry)
                done(entry)
            release(measuring.device)
        if any(entry["status"] == "done" for entry in entries):
            break
    mark_best(entries)
    return entries


def _settings(
    case: Case, measuring: Measuring, quantization: str, checkpointing: bool
) -> Iterator[dict[str, Any]]:
    """One model, growing batches; what is larger than a batch that does not fit is not tried."""
    yield from attempts(
        [_entry(case, measuring, quantization, checkpointing, size) for size in BATCHES],
        lambda: peft_model(case, measuring, quantization, checkpointing=checkpointing),
        lambda model, entry: _run(model, case, measuring, entry["batch_size"]),
        measuring.device,
    )


def _entry(
    case: Case, measuring: Measuring, quantization: str, checkpointing: bool, size: int
) -> dict[str, Any]:
    dtype = str(pick_dtype(case.dtype, measuring.device)).removeprefix("torch.")
    short = {"bfloat16": "bf16"}.get(dtype, dtype)
    words = [short if quantization == "none" else quantization, f"batch {size}"]
    return {
        "name": f"{case.shape} peft {' '.join(words + ['checkpointing'] * checkpointing)}",
        "baseline": "peft",
        "best": False,
        "shape": case.shape,
        "quantization": quantization,
        "batch_size": size,
        "gradient_checkpointing": checkpointing,
        "dtype": dtype,
        "status": "done",
        "reason": None,
    }


def _run(model: Any, case: Case, measuring: Measuring, size: int) -> dict[str, Any]:
    device = measuring.device
    yardstick = Yardstick.build(find_config(case.shape).vocab_size, case.tasks, measuring.seed)
    batches = padded_batches(yardstick, size, WARMUP + STEPS)
    half = device.type == "cuda" and pick_dtype(case.dtype, device) == torch.bfloat16

    def loss_of(batch: Padded) -> Tensor:
        computing = torch.autocast("cuda", torch.bfloat16) if half else contextlib.nullcontext()
        with computing:
            loss: Tensor = model(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                labels=batch.labels.to(device),
                use_cache=False,
            ).loss
        return loss

    return timed(model, case, measuring, batches, lambda one: one.tokens, loss_of, fused=False)
