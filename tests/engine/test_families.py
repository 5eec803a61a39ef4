"""Each family's plan in the fused engine, in float64 against transformers on each example alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mtl_lora_cli.engine.families import known_types
from mtl_lora_cli.engine.saved import Keep
from mtl_lora_cli.models.packed import Engine, PackedModel
from mtl_lora_cli.models.trust import settle

from .double import adapt_all, alone, examples, in_double, packed_row, tiny

CLOSE = 1e-9
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
LLAMA4_SCALE = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 12,
        "llama_4_scaling_beta": 0.3,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
}
LONG: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.5, 3.0, 3.5],
        "original_max_position_embeddings": 20,
    },
    "original_max_position_embeddings": 20,
}
CONVOLUTIONS = {
    "layer_types": ["conv", "full_attention", "conv"],
    "block_auto_adjust_ff_dim": False,
    "conv_bias": True,
}
GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 4.0,
}
NEAR = {
    "rope_parameters": {**LONG["rope_parameters"], "original_max_position_embeddings": 64},
    "original_max_position_embeddings": 64,
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
}
EXPERTS = {
    "num_experts": 6,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
SIGMOIDS = {
    **EXPERTS,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
    "n_group": 1,
    "topk_group": 1,
}
GATED = {"shared_expert_intermediate_size": 40}
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("llama", "", {}),
    (
        "llama",
        "biases, tied",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    ("mistral", "", {"sliding_window": None}),
    ("mistral", "window", {}),
    ("ministral", "window", MIXED),
    ("ministral3", "scaled queries", {"sliding_window": None, **LLAMA4_SCALE}),
    ("phi3", "longrope", {"sliding_window": None, **LONG}),
    ("phi3", "near longrope", {"sliding_window": None, **NEAR}),
    ("qwen2", "", {}),
    ("qwen2", "window", {"use_sliding_window": True, "max_window_layers": 1}),
    ("qwen3", "", {}),
    ("qwen3", "window", {"use_sliding_window": True, "max_window_layers": 1}),
    ("qwen3_5_text", "delta nets", DELTA),
    ("qwen3_5_text", "no attention", {**DELTA, "layer_types": ["linear_attention"] * 3}),
    ("qwen3_5_moe_text", "delta nets", {**DELTA, **EXPERTS, **GATED}),
    ("qwen3_next", "delta nets", {**DELTA, **EXPERTS, **GATED, "mlp_only_layers": [1]}),
    ("lfm2", "convolutions", CONVOLUTIONS),
    ("gemma", "", {}),
    ("gemma2", "caps", {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, **MIXED}),
    ("gemma3_text", "", MIXED),
    ("gemma4_text", "", GEMMA4),
    (
        "gemma4_unified_text",
        "k = v",
        {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    ("gemma3_text", "cap", {"final_logit_softcapping": 4.0, "query_pre_attn_scalar": 20, **MIXED}),
    ("smollm3", "", {"no_rope_layers": [1, 0, 1]}),
    ("smollm3", "window", {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, **MIXED}),
    ("phi3", "window", {}),
    ("phi3", "part", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    ("glm", "part, pairs", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    ("glm4", "pairs", {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}),
    ("exaone4", "window", MIXED),
    ("cwm", "window", MIXED),
    ("mixtral", "window", EXPERTS),
    ("qwen3_moe", "some dense", {"mlp_only_layers": [1], "norm_topk_prob": True, **EXPERTS}),
    ("olmoe", "", EXPERTS),
    (
        "qwen2_moe",
        "some dense",
        {"mlp_only_layers": [1], "shared_expert_intermediate_size": 40, **EXPERTS},
    ),
    ("glm4_moe", "", {**SIGMOIDS, "use_qk_norm": True}),
    ("glm4_moe", "groups", {**SIGMOIDS, "n_group": 3, "topk_group": 2}),
    ("gpt_oss", "", {**EXPERTS, **MIXED, "swiglu_limit": 1.0}),
    ("dots1", "window", {**SIGMOIDS, "max_window_layers": 1}),
    ("olmo2", "", {}),
    ("olmo3", "window", MIXED),
    (
        "granite",
        "",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.5,
        },
    ),
)


def furthest(
    model: Any, keep: Keep | None = None, engine: Engine = "fused", **settings: Any
) -> float:
    """The largest difference of a log-probability, or of a gradient beside its tensor's largest."""
    bare, some = copy.deepcopy(model), examples()
    adapter = adapt_all(model, **settings)
    packed = PackedModel(model, adapter, engine=engine, keep=keep).train()
    batch = packed_row(some)
    leaves = {
        name: tensor.detach().clone().requires_grad_() for name, tensor in adapter.tensors().items()
    }
    with in_double():
        right = alone(bare, leaves, some)
        (right * torch.linspace(1, 2, len(right))).sum().backward()
        with packed.routed(batch):
            found = packed(batch)
            (found * torch.linspace(1, 2, len(found))).sum().backward()
    worst = [float((found - right).detach().abs().max())]
    for name, tensor in adapter.tensors().items():
        wanted = leaves[name].grad
        assert wanted is not None and tensor.grad is not None
        worst.append(float((tensor.grad - wanted).abs().max() / wanted.abs().max()))
    return max(worst)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        pytest.param(kind, changes, id=f"{kind} {variant}".strip())
        for kind, variant, changes in CASES
    ],
)
def test_fused_is_transformers_alone(model_type: str, changes: dict[str, Any]) -> None:
    assert furthest(tiny(model_type, **changes)) < CLOSE


@pytest.mark.parametrize(
    "keep",
    [Keep(attended=False), Keep(qkv=False), Keep(gate_up=False), Keep(False, False, False)],
    ids=str,
)
@pytest.mark.parametrize(
    ("model_type", "changes"), [("gemma3_text", MIXED), ("olmo3", MIXED), ("qwen3_5_text", DELTA)]
)
def test_what_is_computed_again_is_the_same(
    model_type: str, changes: dict[str, Any], keep: Keep
) -> None:
    assert furthest(tiny(model_type, **changes), keep) < CLOSE


# tests/vision/test_packed.py asks the same of these, with the pictures that they read.
WITH_PICTURES = {"qwen2_5_vl_text", "qwen3_vl_text"}


@pytest.mark.parametrize("model_type", sorted({*known_types()} - WITH_PICTURES))
def test_the_self_test_keeps_it_on_the_fused_engine(model_type: str) -> None:
    """In 16 bit, where a small model of the same kind is asked, too."""
    changes = next(changes for kind, _, changes in CASES if kind == model_type)
    model = tiny(model_type, **changes).to(torch.bfloat16)
    packed = PackedModel(model).eval()
    assert settle(packed).way is None, packed.not_fused


@pytest.mark.parametrize("model_type", ["glm4", "olmo2", "gemma3_text"])
def test_no_layer_reads_what_another_ones_module_holds(model_type: str) -> None:
    """A norm behind a block is computed by who adds its output: under ZeRO-3 the block's weights are gone then."""
    packed, batch = PackedModel(tiny(model_type), engine="fused"), packed_row(examples())
    assert packed.decoder is not None
    calls = packed.decoder.layer_calls

    def alone_there(number: int) -> Any:
        own, call = list(packed.decoder.modules[number].parameters()), calls[number]
        weights = [one.data for one in own]
        for one in own:
            one.data = one.data.new_empty(0)

        def run(*arguments: Any) -> Any:
            for one, weight in zip(own, weights, strict=True):
                one.data = weight
            found = call(*arguments)
            for one in own:
                one.data = one.data.new_empty(0)
            return found

        return run

    with torch.no_grad(), packed.routed(batch):
        right = packed(batch)
        packed.decoder.layer_calls = [alone_there(number) for number in range(len(calls))]
        assert torch.equal(packed(batch), right)
