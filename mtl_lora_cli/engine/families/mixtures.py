"""Mixtures of experts whose router is a softmax: Mixtral, Qwen 3 MoE, OLMoE (transformers' modules of these names).

Attention is LLaMA's, with a window (Mixtral), with norms of each head (Qwen 3) or of all heads together (OLMoE).
"""

from __future__ import annotations

from typing import Any

from mtl_lora_cli.engine.families import family, llama
from mtl_lora_cli.engine.plan import ExpertsPlan, LayerPlan, NotPlanned, Plan


@family("mixtral")
def mixtral(config: Any) -> Plan:
    """Mixtral: two of eight experts."""
    if config.router_jitter_noise:
        raise NotPlanned("noise in front of the router")
    first = llama.attention(config, rotary=llama.rotary(config), window=config.sliding_window)
    second = _experts(config, config.num_local_experts, renormalised=True)
    return llama.stack(config, [LayerPlan(first, second)] * config.num_hidden_layers)


@family("qwen3_moe")
def qwen3_moe(config: Any) -> Plan:
    """Qwen 3 MoE; some layers may be dense."""
    first = llama.attention(
        config,
        rotary=llama.rotary(config),
        window=config.sliding_window,
        q_norm=llama.norm(config, "self_attn.q_norm"),
        k_norm=llama.norm(config, "self_attn.k_norm"),
    )
    second = _experts(config, config.num_experts, renormalised=config.norm_topk_prob)
    dense = llama.mlp(config)
    layers = [
        LayerPlan(first, second if _sparse(config, number) else dense)
        for number in range(config.num_hidden_layers)
    ]
    return llama.stack(config, layers)


@family("olmoe")
def olmoe(config: Any) -> Plan:
    """OLMoE."""
    if config.clip_qkv is not None:
        raise NotPlanned("queries, keys and values that are clipped")
    first = llama.attention(
        config,
        rotary=llama.rotary(config),
        q_norm=llama.norm(config, "self_attn.q_norm"),
        k_norm=llama.norm(config, "self_attn.k_norm"),
    )
    second = _experts(config, config.num_experts, renormalised=config.norm_topk_prob)
    return llama.stack(config, [LayerPlan(first, second)] * config.num_hidden_layers)


def _experts(config: Any, count: int, *, renormalised: bool) -> ExpertsPlan:
    return ExpertsPlan(
        router="mlp.gate",
        stack="mlp.experts",
        experts=count,
        top=config.num_experts_per_tok,
        renormalised=renormalised,
        activation=llama.activation(config.hidden_act),
        before=llama.norm(config, "post_attention_layernorm"),
    )


def _sparse(config: Any, number: int) -> bool:
    """Whether a layer of Qwen's has experts."""
    steps = (number + 1) % config.decoder_sparse_step == 0
    return number not in config.mlp_only_layers and config.num_experts > 0 and steps
