"""What both baselines of PEFT share: its model, settings tried one after another, whole steps by the clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mtl_lora_cli.bench.case import LEARNING_RATE, Measuring, model_sizes, shares_of_floor
from mtl_lora_cli.bench.cases import Case
from mtl_lora_cli.bench.random_model import random_model
from mtl_lora_cli.bench.shapes import find_config
from mtl_lora_cli.bench.timing import time_steps
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.machine.cards import pick_dtype, release
from mtl_lora_cli.machine.rate import floor_json

WARMUP, STEPS = 2, 4  # of each setting: it only has to be seen which one is the best, and how good

Batch = TypeVar("Batch")


def attempts(
    entries: Sequence[dict[str, Any]],
    build: Callable[[], Any],
    run: Callable[[Any, dict[str, Any]], dict[str, Any]],
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Settings of one model in the order of their size; behind one that fails none is tried.

    Args:
        entries: of each setting, what is known before it is measured.
        build: makes the model, when it is first needed.
        run: measures the model in a setting.
        device: whose memory is released after each.

    Yields:
        The entries with what was measured, or with `status` and `reason`.
    """
    model: Any = None
    reason = None
    for entry in entries:
        found = dict(entry)
        if reason is None:
            try:
                if model is None:
                    model = build()
                found |= run(model, entry)
            except Exception as error:  # a setting that fails takes no other measurement with it
                reason = why_not(error)
            if model is not None:
                model.zero_grad(set_to_none=True)
            release(device)
        if reason is not None:
            found |= {"status": "failed", "reason": reason}
        yield found


def mark_best(entries: Sequence[dict[str, Any]]) -> None:
    """The fastest that was measured gets `best`."""
    finished = [entry for entry in entries if entry["status"] == "done"]
    if finished:
        max(finished, key=lambda entry: entry["tokens_per_second"])["best"] = True


def why_not(error: Exception) -> str:
    """Why there is no measurement, in a line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit"
    if isinstance(error, MtlLoraError):
        return error.lines[0]
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


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


def timed(
    model: Any,
    case: Case,
    measuring: Measuring,
    batches: Sequence[Batch],
    tokens: Callable[[Batch], int],
    loss_of: Callable[[Batch], Tensor],
    *,
    fused: bool,
) -> dict[str, Any]:
    """Whole steps: loss, gradient, clipping, AdamW.

    Args:
        model: PEFT's.
        case, measuring: whose shape, clipping, device and rate are taken.
        batches: one a step, those of the warm-up first.
        tokens: real ones in a batch.
        loss_of: the mean loss of a batch.
        fused: AdamW in one kernel.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=fused)

    def step(batch: Batch) -> Tensor:
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, case.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    timing = time_steps(step, batches, tokens, warmup=WARMUP, device=measuring.device)
    sizes, flop = model_sizes(case.shape, measuring.device)
    floor = floor_json(measuring.rate, flop)
    return {
        **timing.to_json(),
        "trained_parameters": sum(p.numel() for p in trained),
        **sizes,
        "floor": floor,
        **shares_of_floor(timing.tokens_per_second, floor),
    }
