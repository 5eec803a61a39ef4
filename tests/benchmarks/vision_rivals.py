"""What `vision_speed.py` holds ours against: PEFT over the same packed rows, and over padded ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vision_shapes import tokens_of

from mtl_lora_cli.bench import packed_baseline as packed_rows
from mtl_lora_cli.bench.timing import time_steps
from mtl_lora_cli.engine.plan import text_body
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.sight import features_of
from mtl_lora_cli.models.vision import vision_class

RANK = 8
RATE = 1e-4
WARM_UP = 4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def stepped(
    step: Callable[[Any], Tensor],
    batches: Sequence[Any],
    tokens: Callable[[Any], int],
    device: torch.device,
) -> dict[str, Any]:
    timing = time_steps(step, batches, tokens, warmup=WARM_UP, device=device).to_json()
    return {
        k: timing[k]
        for k in (
            "tokens_per_second",
            "tokens_per_second_min",
            "tokens_per_second_max",
            "peak_memory_gib",
            "losses",
            "seconds",
        )
    }


def peft_model(model: Any, dtype: torch.dtype, narrow: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    inside = text_body(model)
    path = next(name for name, module in model.named_modules() if module is inside)
    settings = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=rf"{path}.*\.({'|'.join(TARGETS)})",
        task_type="CAUSAL_LM",
    )
    found = get_peft_model(model, settings, autocast_adapter_dtype=not narrow).train()
    for module in (
        (found.get_base_model().model.vision_tower,)
        if hasattr(found.get_base_model().model, "vision_tower")
        else ()
    ):
        module.eval()
    if narrow:
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return found


@dataclass(frozen=True)
class Fill:
    """What passes are filled up to, so that no graph is compiled twice: tokens, examples, and the longest's tokens."""

    size: int = 0
    most: int = 0
    longest: int = 0


def fill_of(batches: Sequence[PackedBatch]) -> Fill:
    sizes = [batch.input_ids.shape[1] for batch in batches]
    most = max(len(batch.segments.bounds) for batch in batches) + 1
    longest = max(batch.segments.longest for batch in batches)
    return Fill(max(sizes), most, max(longest, max(sizes) - min(sizes)))


def rival(
    model: Any, batches: list[PackedBatch], device: torch.device, dtype: torch.dtype, kernels: str
) -> dict[str, Any]:
    """PEFT over the same packed rows."""
    packed_rows._register()
    found = peft_model(model, dtype, narrow=True)
    inner = found.get_base_model()
    body = text_body(inner)
    body.set_attn_implementation(packed_rows.NAME)
    if kernels == "liger" and device.type == "cuda":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(
            model=body, cross_entropy=False, fused_linear_cross_entropy=False
        )
    if kernels == "compile":
        for layer in body.layers:
            layer.compile()

    fill = fill_of(batches) if kernels == "compile" else Fill()

    def loss_of(batch: PackedBatch) -> Tensor:
        on = batch.to(device)
        shown, more = on.pictures, max(0, fill.size - batch.input_ids.shape[1])
        assert shown is not None
        with torch.no_grad():
            seen = features_of(inner, shown.seen)
        ids = nn.functional.pad(on.input_ids.index_fill(1, shown.places, 0), (0, more))
        x = inner.get_input_embeddings()(ids)
        x = x[0].index_copy(0, shown.places, seen.tokens.to(x.dtype))[None]
        ends = [end for _, end in batch.segments.bounds]
        bounds = [0, *ends, *[ids.shape[1]] * (fill.most - len(ends))]
        behind = torch.arange(more, device=device)[None]
        hidden = body(
            inputs_embeds=x,
            position_ids=torch.cat([on.position_ids, behind], dim=1),
            bounds=torch.tensor(bounds, dtype=torch.int32, device=device),
            longest=fill.longest or batch.segments.longest,
            use_cache=False,
        ).last_hidden_state
        logits = inner.get_output_embeddings()(hidden[0, on.positions.to(device)]).float()
        return nn.functional.cross_entropy(logits, on.targets)

    return _trained(found, batches, loss_of, device)


def padded(
    model: Any, batches: list[PackedBatch], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """One example a row, filled up; the model's own forward pass and loss."""
    found = peft_model(model, dtype, narrow=False)
    inner = found.get_base_model()
    text_body(inner).set_attn_implementation("sdpa")

    def loss_of(batch: PackedBatch) -> Tensor:
        rows, labels = [], []
        asked = dict(zip(batch.positions.tolist(), batch.targets.tolist(), strict=True))
        for start, end in batch.segments.bounds:
            ids = batch.input_ids[0, start:end]
            own = torch.tensor([-100, *(asked.get(n, -100) for n in range(start, end))])
            rows.append(torch.cat([ids, own[-1:]]))
            labels.append(own)
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        own = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        kind = vision_class(inner.config)
        assert kind is not None and batch.pictures is not None
        seen = {
            n: v.to(device, dtype if v.is_floating_point() else None)
            for n, v in kind.join(batch.pictures.seen).items()
        }
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = found(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                labels=own.to(device),
                use_cache=False,
                **seen,
            )
        return out.loss

    return _trained(found, batches, loss_of, device)


def _trained(
    found: Any,
    batches: list[PackedBatch],
    loss_of: Callable[[PackedBatch], Tensor],
    device: torch.device,
) -> dict[str, Any]:
    learning = [p for p in found.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=0.0, fused=device.type == "cuda")

    def step(batch: PackedBatch) -> Tensor:
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return stepped(step, batches, tokens_of, device)
