"""A model as transformers alone has it: the party that a check asks, and none of our code in it.

Its own classes load it, with the attention that they choose; its own forward and `generate` answer. (Bytes come to
a card as those of any base model do, `models/straight.py`; tests hold that against safetensors' own reader.) Each
example is asked by itself, and nothing is filled up to another one's length. Only candidates of one
example, and of one length, share a pass; a candidate's last token is only asked for, so candidates
that differ in it alone cost one row together.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from mtl_lora_cli.adapters.experts import STACKS, expert_modules
from mtl_lora_cli.errors import CheckError
from mtl_lora_cli.evaluation.asked import Stopped
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.machine.cards import pick_device
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import bits_and_bytes, compute_in, load_config, model_class
from mtl_lora_cli.models.prequantised import expanding, kept_quantised, method_of
from mtl_lora_cli.models.quiet import quiet_loading
from mtl_lora_cli.models.straight import straight_to

_TOKENS_PER_PASS = {"cpu": 2048, "cuda": 32768}  # of one example's candidates together


def load_alone(
    folder: Path, dtype: torch.dtype, *, quantization: str = "none", in_float32: bool = False
) -> Any:
    """A transformers folder, loaded as any user would.

    Args:
        folder: with config and safetensors.
        dtype: of the weights that are not quantised.
        quantization: as in a recipe. Such weights are rounded and expanded again by bitsandbytes: a run
            multiplies with what they stand for, while bitsandbytes would round the other factor, too.
        in_float32: compute in float32; quantised weights stay those of `dtype`.

    Raises:
        CheckError: transformers does not load it, or finds no value for a weight.
    """
    base = find_base_model(str(folder))
    kind = model_class(base, load_config(base))
    how = expanding(base, quantization) or bits_and_bytes(quantization, dtype)
    try:
        with quiet_loading(), straight_to(pick_device()):
            model, loading = kind.from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32 if in_float32 and quantization == "none" else dtype,
                device_map={"": pick_device()},
                output_loading_info=True,
                **({} if how is None else {"quantization_config": how}),
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckError(f"transformers does not load {folder}: {reason}") from None
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CheckError(
            f"transformers finds no value for {len(missing)} weights in {folder}, the first is {missing[0]}"
        )
    exactly = torch.float32 if in_float32 else dtype
    if quantization != "none" or method_of(base) is not None:
        compute_in(model, exactly)
    if quantization != "none" or kept_quantised(base):
        model = model.dequantize(exactly)
    if quantization in ("nf4", "fp4"):
        _round_experts(model, quantization)
    _leave_logits_unrounded(model)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _round_experts(model: Any, kind: str) -> None:
    """Round stacks of experts to 4 bits and expand them again, by bitsandbytes alone."""
    import bitsandbytes.functional as bnb

    for _, module in expert_modules(dict(model.named_modules())):
        for name in STACKS:
            weight = module._parameters[name]
            assert weight is not None
            packed, state = bnb.quantize_4bit(
                weight.reshape(1, -1), blocksize=64, compress_statistics=True, quant_type=kind
            )
            weight.copy_(bnb.dequantize_4bit(packed, state).view_as(weight))


def score_alone(model: Any, requests: Sequence[Request]) -> list[np.ndarray]:
    """Log-probabilities of every candidate of every request, as `evaluation.choices.score` gives them.

        log p(choice) = Σ_i log softmax(logits of what stands before token i)[token i]

    Args:
        model: a transformers causal language model.
        requests: each is asked by itself; its task is not looked at.

    Returns:
        For each request its candidates' log-probabilities, float64 [choices].
    """
    return [_score_one(model, request) for request in requests]


def generate_alone(
    model: Any,
    requests: Sequence[Request],
    *,
    ends: Collection[int],
    new_tokens: Sequence[int],
    stopped: Stopped,
) -> list[list[int]]:
    """The greedy continuation of each prompt, as `evaluation.generate.generate` gives it.

    Args:
        model: a transformers causal language model; its own defaults of generating are set aside.
        requests: prompts; their candidates are not looked at.
        ends: tokens that end an answer and are not part of it.
        new_tokens: for each request the most tokens that its answer may have, at least 1.
        stopped: whether an answer is complete as it stands.

    Returns:
        Tokens of each answer.
    """
    from transformers import GenerationConfig

    answers: list[list[int]] = []
    for request, most in zip(requests, new_tokens, strict=True):
        ids = torch.tensor([request.prompt], device=model.device)
        start = len(request.prompt)

        def complete(ids: Any, scores: Any, start: int = start, **_: Any) -> Any:
            return torch.tensor([stopped(ids[0, start:].tolist())], device=ids.device)

        # What is not said here, such as a penalty for repetition, would be the checkpoint's.
        model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=most, eos_token_id=list(ends), pad_token_id=min(ends)
        )
        with torch.inference_mode():
            (whole,) = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                stopping_criteria=[complete],
                **_pictures(model, request, ids),
            )
        answer = whole[start:].tolist()
        answers.append(answer[:-1] if answer and answer[-1] in ends else answer)
    return answers


def _leave_logits_unrounded(model: Any) -> None:
    """Let an output layer of 16 bits give float32: rounded logits of 20 or more are off by 0.06."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype == torch.float32:
        return
    wide = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    wide.weight, wide.bias = (
        part if part is None else nn.Parameter(part.detach().float())
        for part in (head.weight, head.bias)
    )
    wide.register_forward_pre_hook(lambda _, inputs: tuple(one.float() for one in inputs))
    model.set_output_embeddings(wide)


@torch.inference_mode()
def _score_one(model: Any, request: Request) -> np.ndarray:
    sums = np.zeros(len(request.choices))
    # Pictures go with one row.
    together = 0 if request.pictures else _TOKENS_PER_PASS[model.device.type]
    for inner in _passes(request, together):
        ids = torch.tensor([[*request.prompt, *tokens] for tokens in inner], device=model.device)
        others = _pictures(model, request, ids)
        logprobs = _last_logits(model, ids, len(inner[0]) + 1, others).double().log_softmax(-1)
        for number, choice in enumerate(request.choices):
            if tuple(choice[:-1]) in inner:
                row = logprobs[inner.index(tuple(choice[:-1]))]
                targets = torch.tensor(choice, device=model.device)
                sums[number] = float(row.gather(1, targets[:, None]).sum())
    return sums


def _passes(request: Request, tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """What follows the prompt in each row, all of a pass of one length: every candidate but its last token."""
    inner = sorted(
        {tuple(choice[:-1]) for choice in request.choices}, key=lambda own: (len(own), own)
    )
    current: list[tuple[int, ...]] = []
    for own in inner:
        full = (len(current) + 1) * (len(request.prompt) + len(own)) > tokens
        if current and (full or len(own) != len(current[0])):
            yield current
            current = []
        current.append(own)
    yield current


def _pictures(model: Any, request: Request, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What transformers' forward pass takes beside the tokens of one row, int64 [1, L]."""
    eyes = request.eyes
    if eyes is None or not request.pictures:
        return {}
    seen = eyes.looked(request.pictures)
    shown = ids.cpu() == eyes.vision.token_id
    given = eyes.vision.alone(seen, shown, len(request.prompt))
    wide = next(model.parameters()).dtype
    on = ids.device
    return {n: v.to(on, wide if v.is_floating_point() else None) for n, v in given.items()}


def _last_logits(
    model: Any, ids: torch.Tensor, count: int, others: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Logits at the last positions, [B, count, V]."""
    own = model.get_base_model() if hasattr(model, "get_base_model") else model  # beneath PEFT's
    asked = inspect.signature(own.forward).parameters
    keep = {"logits_to_keep": count} if "logits_to_keep" in asked else {}
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, **keep, **others).logits
    return logits[:, -count:]
