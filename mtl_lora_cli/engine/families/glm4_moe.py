"""GLM 4.5 and its kin: a router of sigmoids with a correction, a shared MLP, dense layers first.

The router is DeepSeek V3's (arXiv 2412.19437); attention is LLaMA's. transformers' `models/glm4_moe`, `dots1`.
"""

from __future__ import annotations

from typing import Any

from mtl_lora_cli.engine.families import family, llama
from mtl_lora_cli.engine.families.mixtures import experts, shared
from mtl_lora_cli.engine.plan import AttentionPlan, LayerPlan, Plan, RouterPlan


@family("glm4_moe")
def glm4_moe(config: Any) -> Plan:
    """GLM 4.5, Air and 4.6."""
    norms = _head_norms(config) if config.use_qk_norm else {}
    first = llama.attention(config, rotary=llama.rotary(config), **norms)
    return _stack(config, [first] * config.num_hidden_layers)


@family("dots1")
def dots1(config: Any) -> Plan:
    """dots.llm1: windows where the configuration says so."""
    turned, norms = llama.rotary(config), _head_norms(config)
    halves = [
        llama.attention(config, rotary=turned, window=llama.window(config, kind), **norms)
        for kind in llama.layer_types(config)
    ]
    return _stack(config, halves)


def _head_norms(config: Any) -> dict[str, Any]:
    return {name: llama.norm(config, f"self_attn.{name}") for name in ("q_norm", "k_norm")}


def _stack(config: Any, halves: list[AttentionPlan]) -> Plan:
    """The first layers have one MLP, the others experts."""
    second = experts(config, sigmoid(config), shared=shared(config, "shared_experts"))
    dense = llama.mlp(config)
    layers = [
        LayerPlan(first, second if number >= config.first_k_dense_replace else dense)
        for number, first in enumerate(halves)
    ]
    return llama.stack(config, layers)


def sigmoid(config: Any) -> RouterPlan:
    """DeepSeek V3's router."""
    return RouterPlan(
        "mlp.gate",
        config.n_routed_experts,
        config.num_experts_per_tok,
        config.norm_topk_prob,
        scores="sigmoid",
        correction="e_score_correction_bias",
        factor=config.routed_scaling_factor,
        epsilon=1e-20,
        groups=config.n_group,
        top_groups=config.topk_group,
        wide=True,
    )
