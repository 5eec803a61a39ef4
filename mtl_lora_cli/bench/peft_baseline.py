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

from mtl_lora_cli.bench.case import LEARNING_RATE, Measuring, model_sizes, shares_of_floor
from mtl_lora_cli.bench.cases import Case
from mtl_lora_cli.bench.random_model import random_model
from mtl_lora_cli.bench.shapes import find_config
from mtl_lora_cli.bench.timing import time_steps
from mtl_lora_cli.bench.yardstick import Yardstick
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.machine.cards import pick_dtype, release
from mtl_lora_cli.machine.rate import floor_json

BATCHES = (8, 16, 32)
WARMUP, STEPS = 2, 4  # of each setting: it only has to be seen which one is the best, and how good


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
    finished = [entry for entry in entries if entry["status"] == "done"]
    if finished:
        max(finished, key=lambda entry: entry["tokens_per_second"])["best"] = True
    return entries


def _settings(
    case: Case, measuring: Measuring, quantization: str, checkpointing: bool
) -> Iterator[dict[str, Any]]:
    """One model, growing batches; what is larger than a batch that does not fit is not tried."""
    model: Any = None
    reason = None
    for size in BATCHES:
        entry = _entry(case, measuring, quantization, checkpointing, size)
        if reason is None:
            try:
                if model is None:
                    model = peft_model(case, measuring, quantization, checkpointing=checkpointing)
                entry |= _run(model, case, measuring, size)
            except Exception as error:  # a setting that fails takes no other with it
                reason = why_not(error)
            if model is not None:
                model.zero_grad(set_to_none=True)
            release(measuring.device)
        if reason is not None:
            entry |= {"status": "failed", "reason": reason}
        yield entry


def why_not(error: Exception) -> str:
    """Why there is no measurement, in a line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit"
    if isinstance(error, MtlLoraError):
        return error.lines[0]
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


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


def peft_model(
    case: Case,
    measuring: Measuring,
    quantization: str,
    *,
    checkpointing: bool,
    attention: str = "sdpa",
    narrow: bool = False,
) -> Any:
    """transformers' model with PEFT's plain LoRA of the case's rank and targets, ready to be trained.

    Args:
        case, measuring: whose shape, adapter, device and seed are taken.
        quantization: of the base weights, `none` or `nf4`.
        checkpointing: layers are computed again in the backward pass.
        attention: transformers' name of it.
        narrow: adapters stay in the base model's dtype; PEFT makes them float32 of its own accord.

    Raises:
        MtlLoraError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MtlLoraError("PEFT is not installed; get it with: pip install peft") from None

    torch.manual_seed(measuring.seed)
    model = random_model(
        find_config(case.shape),
        dtype=pick_dtype(case.dtype, measuring.device),
        device=measuring.device,
        quantization=quantization,
        attention=attention,
    )
    if quantization == "nf4":
        model.is_loaded_in_4bit = True  # what from_pretrained would have set; PEFT asks for it
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    rank = case.adapter["rank"]
    settings = LoraConfig(
        r=rank,
        lora_alpha=case.adapter.get("alpha", 2 * rank),
        lora_dropout=case.adapter.get("dropout", 0.0),
        target_modules=list(case.adapter["target_modules"]),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings, autocast_adapter_dtype=not narrow).train()


def _run(model: Any, case: Case, measuring: Measuring, size: int) -> dict[str, Any]:
    device = measuring.device
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    config = find_config(case.shape)
    yardstick = Yardstick.build(config.vocab_size, case.tasks, measuring.seed)
    batches = padded_batches(yardstick, size, WARMUP + STEPS)
    half = device.type == "cuda" and pick_dtype(case.dtype, device) == torch.bfloat16

    def step(batch: Padded) -> Tensor:
        computing = torch.autocast("cuda", torch.bfloat16) if half else contextlib.nullcontext()
        with computing:
            loss = model(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                labels=batch.labels.to(device),
                use_cache=False,
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, case.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    timing = time_steps(step, batches, lambda batch: batch.tokens, warmup=WARMUP, device=device)
    sizes, flop = model_sizes(case.shape, device)
    floor = floor_json(measuring.rate, flop)
    return {
        **timing.to_json(),
        "trained_parameters": sum(p.numel() for p in trained),
        **sizes,
        "floor": floor,
        **shares_of_floor(timing.tokens_per_second, floor),
    }
