"""What is right, in float64: transformers' own model on each example alone, with weights W_t.

transformers rounds norms, shares and angles to float32 whatever the model's dtype is. Inside `in_double`
it does not, so that nothing but float64's own rounding is left between two ways to the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mtl_lora_cli.adapters.inject import Adapter, inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.models.batch import PackedBatch

VOCABULARY, WINDOW = 160, 9
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "sliding_window": WINDOW,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TASKS = ("one", "two", "three")
EXAMPLES = ((23, 0), (WINDOW, 1), (4, -1), (31, 2), (WINDOW + 1, 0))  # tokens, and the task
RANK, SCALE, TEMPERATURE, UPS = 3, 2.0, 0.5, 2


@contextmanager
def in_double() -> Iterator[None]:
    """float64 is never rounded to float32."""
    to, wide, cast = Tensor.to, Tensor.float, Tensor.type
    softmax = nn.functional.softmax

    def kept(self: Tensor, *given: Any, **named: Any) -> Tensor:
        if self.dtype == torch.float64 and torch.float32 in (*given, named.get("dtype")):
            return self
        return to(self, *given, **named)

    def own_type(self: Tensor, *given: Any, **named: Any) -> Any:
        return self if self.dtype == torch.float64 and given else cast(self, *given, **named)

    def own_softmax(x: Tensor, *given: Any, **named: Any) -> Tensor:
        if x.dtype == torch.float64:
            named.pop("dtype", None)
        return softmax(x, *given, **named)

    with (
        mock.patch.object(Tensor, "to", kept),
        mock.patch.object(Tensor, "type", own_type),
        mock.patch.object(Tensor, "float", lambda x: x if x.dtype == torch.float64 else wide(x)),
        mock.patch.object(nn.functional, "softmax", own_softmax),
    ):
        yield


def tiny(model_type: str, **changes: Any) -> Any:
    """A small model of that type in float64, with weights at random that matter; eager attention."""
    kind = CONFIG_MAPPING[model_type]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        kind(**{**COMMON, **changes}), dtype=torch.float64, attn_implementation="eager"
    )
    if hasattr(model, "set_experts_implementation"):  # torch's grouped product knows no float64
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.2 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(std=0.3)
    return model.requires_grad_(False).eval()


def in_dtype(model: Any, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    """The model's weights in that dtype; its rotary frequencies stay float32, as loading leaves them."""
    kept = {n: b.clone() for n, b in model.named_buffers() if n.endswith("inv_freq")}
    model.to(device=device, dtype=dtype)
    for name, buffer in kept.items():
        path, _, own = name.rpartition(".")
        model.get_submodule(path).register_buffer(own, buffer.to(device), persistent=False)
    return model


def adapt_all(
    model: Any, *, bare: Any = None, dtype: torch.dtype = torch.float64, **more: Any
) -> Adapter:
    """An adapter of three tasks on every linear layer but the head, far from its start; `more` settings.

    Args:
        bare: whose linear layers are meant, where the model's own are wrapped or of another class.
        dtype: of the adapter's tensors.
    """
    targets = {path.rpartition(".")[2] for path in linear_layers(model if bare is None else bare)}
    config = configure(
        rank=RANK,
        alpha=SCALE * RANK,
        up_projections=UPS,
        temperature=TEMPERATURE,
        target_modules=tuple(sorted(targets)),
        **more,
    )
    adapter = inject(model, config, TASKS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).to(tensor))
            tensor.data = tensor.data.to(dtype)
    return adapter


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Path → layer, without the head."""
    head = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    }


def examples() -> list[tuple[Tensor, int]]:
    """Random tokens and their task, longer and shorter than the window."""
    generator = torch.Generator().manual_seed(2)
    return [(torch.randint(3, VOCABULARY, (n,), generator=generator), t) for n, t in EXAMPLES]


def packed_row(some: Sequence[tuple[Tensor, int]], every: int = 2) -> PackedBatch:
    """All of them in one row; every second position is asked for."""
    lengths = [len(tokens) for tokens, _ in some]
    tokens = torch.cat([tokens for tokens, _ in some])
    ends = torch.tensor([0, *lengths]).cumsum(0)
    asked = torch.cat(
        [torch.arange(int(ends[i]), int(ends[i + 1]) - 1, every) for i in range(len(some))]
    )
    tasks = torch.tensor([task for _, task in some])
    return PackedBatch(
        input_ids=tokens[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        task_ids=torch.repeat_interleave(tasks, torch.tensor(lengths))[None],
        segments=Segments.build(lengths),
        positions=asked,
        owner=torch.arange(len(asked)),
        targets=tokens[asked + 1],
    )


def alone(
    model: Any,
    tensors: Mapping[str, Tensor],
    some: Sequence[tuple[Tensor, int]],
    every: int = 2,
) -> Tensor:
    """log p of the same questions, each example by itself through transformers' model without adapters."""
    found = []
    for tokens, task in some:
        tokens = tokens.to(next(model.parameters()).device)
        weights = adapted(model, tensors, task)
        out = functional_call(model, weights, (), {"input_ids": tokens[None], "use_cache": False})
        places = torch.arange(0, len(tokens) - 1, every, device=tokens.device)
        wide = torch.promote_types(out.logits.dtype, torch.float32)
        logprobs = out.logits[0].to(wide).log_softmax(-1)
        found.append(logprobs[places, tokens[places + 1]])
    return torch.cat(found)


def adapted(model: Any, tensors: Mapping[str, Tensor], task: int) -> dict[str, Tensor]:
    """W_t = W + s Σ_i g_{t,i} B_i Λ_t A of every adapted layer, under its weight's name and in its dtype."""
    if task < 0:
        return {}
    parameters = dict(model.named_parameters())
    weights = {}
    for name in tensors:
        path, _, role = name.rpartition(".")
        if role != "lora_A":
            continue
        down, ups, transforms, gates = (
            tensors[f"{path}.{role}"]
            for role in ("lora_A", "lora_B", "task_transform", "task_gate")
        )
        if path in parameters:
            weight = parameters[path]
            transposed = bool(model.get_submodule(path.rpartition(".")[0]).is_transposed)
            changes = []
            for expert in range(len(weight)):
                own = (
                    (down[expert], ups[expert], transforms[task, expert], gates[task, expert])
                    if down.ndim == 4
                    else (down, ups, transforms[task], gates[task])
                )
                change = update(*own)
                changes.append(change.T if transposed else change)
            weights[path] = (weight + SCALE * torch.stack(changes)).to(weight.dtype)
        else:
            weight = parameters[f"{path}.weight"]
            change = update(down, ups, transforms[task], gates[task])
            weights[f"{path}.weight"] = (weight + SCALE * change).to(weight.dtype)
    return weights


def update(down: Tensor, ups: Tensor, transform: Tensor, gate: Tensor) -> Tensor:
    """Σ_i g_i B_i Λ A, where the rank is another one by alpha over that."""
    shares = torch.softmax(gate / TEMPERATURE, dim=-1)
    parts = [g * up @ transform @ down[0] for g, up in zip(shares, ups, strict=True)]
    return torch.stack(parts).sum(0) * (RANK / down.shape[1])
