"""The strongest rival that a skilled user builds of public parts: PEFT over packed rows.

The same packed rows as ours, filled up to one size; adapters in the base model's 16 bits; attention of
variable length, torch's own; the head only where something is asked; fused AdamW; and either Liger's
kernels or `torch.compile` a layer. One and two rows a pass are tried. Tokens that fill a row up are
never counted. Windows are kept. torch's attention knows no sinks and no soft caps: a model that has some is measured
without them, which is less work, and its entries say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mtl_lora_cli.bench.case import Measuring
from mtl_lora_cli.bench.cases import Case
from mtl_lora_cli.bench.rival import STEPS, WARMUP, attempts, mark_best, peft_model, timed
from mtl_lora_cli.bench.shapes import find_config
from mtl_lora_cli.bench.yardstick import Yardstick
from mtl_lora_cli.engine.families import plan_of
from mtl_lora_cli.engine.plan import NotPlanned
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.machine.cards import pick_dtype, release

ROWS = (1, 2)  # a pass
NAME = "mtl_lora_bench_varlen"  # of the attention, as transformers knows it


@dataclass(frozen=True)
class PackedRows:
    """One pass of the rival: rows one after another, filled up to N positions.

    Attributes:
        input_ids, position_ids: int64 [1, N].
        bounds: int32 [B + 1], where examples begin, and N; what fills up is one more of them.
        longest: positions of the longest example, the same for all passes.
        asked: int64 [S], positions whose next token counts.
        targets: int64 [S], those tokens.
        tokens: real ones.
    """

    input_ids: Tensor
    position_ids: Tensor
    bounds: Tensor
    longest: int
    asked: Tensor
    targets: Tensor
    tokens: int

    def to(self, device: torch.device) -> dict[str, Any]:
        names = ("input_ids", "position_ids", "bounds", "asked", "targets")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return {**moved, "longest": self.longest}


def packed_rows(
    yardstick: Yardstick, row_length: int, rows: int, count: int, seed: int
) -> list[PackedRows]:
    """The rows of `count` steps, as ours are, all of one shape: no graph is compiled twice."""
    steps = yardstick.steps(
        count, row_length=row_length, rows_per_step=rows, rows_per_pass=rows, seed=seed
    )
    batches = [(step.batches[0], step.tokens) for step in steps]
    size = max(row_length * rows, *(batch.input_ids.shape[1] for batch, _ in batches))
    most = max(len(batch.segments.bounds) for batch, _ in batches) + 1
    lengths = [end - start for batch, _ in batches for start, end in batch.segments.bounds]
    shortest = min(batch.input_ids.shape[1] for batch, _ in batches)
    longest = max(*lengths, size - shortest)
    made = []
    for batch, tokens in batches:
        filled = size - batch.input_ids.shape[1]
        ends = [end for _, end in batch.segments.bounds]
        bounds = [0, *ends, *[size] * (most - len(ends))]
        made.append(
            PackedRows(
                nn.functional.pad(batch.input_ids, (0, filled)),
                torch.cat([batch.position_ids, torch.arange(filled)[None]], dim=1),
                torch.tensor(bounds, dtype=torch.int32),
                longest,
                batch.positions[batch.owner],
                batch.targets,
                tokens,
            )
        )
    return made


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    bounds: Tensor | None = None,
    longest: int = 0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within examples, [1, heads, N, d] → [1, N, heads, d]: torch's varlen kernel.

    Where there is no card, torch's `scaled_dot_product_attention` for each example.

    Raises:
        MtlLoraError: the layer has a window, and torch's kernel none.
    """
    assert bounds is not None
    window = sliding_window if sliding_window and sliding_window < longest else None
    if query.device.type != "cuda":
        return _one_by_one(query, key, value, bounds, scaling, window), None
    from torch.nn.attention.varlen import varlen_attn

    known = signature(varlen_attn).parameters
    repeat = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"scale": scaling} if "scale" in known else {}
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is not None:
        raise MtlLoraError("this torch's varlen attention knows no window")
    else:
        options["is_causal"] = True
    if "enable_gqa" in known:
        options["enable_gqa"] = repeat > 1
    elif repeat > 1:
        key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    found: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
    return found[None], None


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    attend: Any = partial(
        nn.functional.scaled_dot_product_attention, scale=scaling, enable_gqa=True
    )
    places = bounds.tolist()
    parts = [
        attend(
            *(x[:, :, start:end] for x in (query, key, value)), attn_mask=_seen(end - start, window)
        )
        for start, end in pairwise(places)
        if end > start
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def _seen(length: int, window: int | None) -> Tensor:
    """Which positions each sees: bool [length, length]."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    return seen if window is None else seen.triu(1 - window)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)


def run_all(
    case: Case, measuring: Measuring, done: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Try every setting, with the case's own base weights, 16-bit or NF4.

    Args:
        case: whose shape, rank, targets, quantisation and rows are taken.
        measuring: how.
        done: told of each setting.

    Returns:
        An entry for each; the fastest has `best`.
    """
    _register()
    # Liger last: it changes functions of transformers for the whole process.
    kinds = ("compile", "liger") if measuring.device.type == "cuda" else ("eager",)
    entries = []
    for kind in kinds:
        for entry in _settings(case, measuring, kind):
            entries.append(entry)
            done(entry)
        release(measuring.device)
    mark_best(entries)
    return entries


def _settings(case: Case, measuring: Measuring, kind: str) -> Iterator[dict[str, Any]]:
    """One model, one row a pass and two; what does not run with one is not tried with two."""
    yield from attempts(
        [_entry(case, measuring, kind, rows) for rows in ROWS],
        lambda: _model(case, measuring, kind),
        lambda model, entry: _run(model, case, measuring, entry["rows_per_pass"]),
        measuring.device,
    )


def _entry(case: Case, measuring: Measuring, kind: str, rows: int) -> dict[str, Any]:
    dtype = str(pick_dtype(case.dtype, measuring.device)).removeprefix("torch.")
    short = {"bfloat16": "bf16"}.get(dtype, dtype)
    weights = short if case.quantization == "none" else case.quantization
    return {
        "name": f"{case.shape} packed peft {kind} {weights}, {rows} {'row' if rows == 1 else 'rows'}"
        + "".join(f", without its {what}" for what in _left_out(case.shape)),
        "baseline": "packed",
        "best": False,
        "shape": case.shape,
        "quantization": case.quantization,
        "kernels": kind,
        "rows_per_pass": rows,
        "row_length": case.row_length,
        "dtype": dtype,
        "status": "done",
        "reason": None,
    }


def _left_out(shape: str) -> list[str]:
    """What of the model's attention torch's kernel does not know."""
    try:
        halves = list(plan_of(find_config(shape)).attentions)
    except NotPlanned:
        return []
    has = {
        "sinks": any(half.sinks is not None for half in halves),
        "soft caps": any(half.softcap is not None for half in halves),
    }
    return [what for what, there in has.items() if there]


def _model(case: Case, measuring: Measuring, kind: str) -> Any:
    """PEFT's model with its adapters in the base model's dtype, and with what makes it fast."""
    dtype = pick_dtype(case.dtype, measuring.device)
    model = peft_model(
        case, measuring, case.quantization, checkpointing=False, attention=NAME, narrow=True
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    inner = model.get_base_model()
    if kind == "liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(
            model=inner, cross_entropy=False, fused_linear_cross_entropy=False
        )
    elif kind == "compile":
        for layer in inner.model.layers:
            layer.compile()
    return model


def mean_loss(model: Any, given: dict[str, Any]) -> Tensor:
    """The mean −log p of the tokens that are asked, in float32, the head at their places only."""
    inner = model.get_base_model()
    hidden = inner.model(
        input_ids=given["input_ids"],
        position_ids=given["position_ids"],
        bounds=given["bounds"],
        longest=given["longest"],
        use_cache=False,
    ).last_hidden_state
    logits = inner.get_output_embeddings()(hidden[0, given["asked"]]).float()
    return nn.functional.cross_entropy(logits, given["targets"])


def _run(model: Any, case: Case, measuring: Measuring, rows: int) -> dict[str, Any]:
    device = measuring.device
    yardstick = Yardstick.build(find_config(case.shape).vocab_size, case.tasks, measuring.seed)
    passes = packed_rows(yardstick, case.row_length, rows, WARMUP + STEPS, measuring.seed)
    return timed(
        model,
        case,
        measuring,
        passes,
        lambda one: one.tokens,
        lambda one: mean_loss(model, one.to(device)),
        fused=device.type == "cuda",
    )
