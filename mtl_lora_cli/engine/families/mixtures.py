"""Mixtures of experts whose router is a softmax: Mixtral, Qwen 2 and 3 MoE, OLMoE (transformers' modules of these names).

Attention is LLaMA's, with a window (Mixtral), with norms of each head (Qwen 3) or of all heads together (OLMoE).
"""

from __future__ import annotations

from typing import Any

from mtl_lora_cli.engine.families import family, llama
from mtl_lora_cli.engine.plan import (
    ExpertsPlan,
    LayerPlan,
    NotPlanned,
    Plan,
    RouterPlan,
    SharedPlan,
)


@family("mixtral")
def mixtral(config: Any) -> Plan:
    """Mixtral: two of eight experts."""
    if config.router_jitter_noise:
        raise NotPlanned("noise in front of the router")
    first = llama.attention(config, rotary=llama.rotary(config), window=config.sliding_window)
    second = experts(config, softmax(config, config.num_local_experts, renormalised=True))
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
    second = experts(config, softmax(config, config.num_experts))
    dense = llama.mlp(config)
    layers = [
        LayerPlan(first, second if sparse(config, number) else dense)
        for number in range(config.num_hidden_layers)
    ]
    return llama.stack(config, layers)


@family("qwen2_moe")
def qwen2_moe(config: Any) -> Plan:
    """Qwen 1.5 and 2 MoE: a shared expert with a gate of its own; some layers may be dense."""
    turned = llama.rotary(config)
    second = experts(
        config,
        softmax(config, config.num_experts),
        shared=shared(config, "shared_expert", "mlp.shared_expert_gate"),
    )
    dense, layers = llama.mlp(config), []
    for number, kind in enumerate(llama.layer_types(config)):
        window = llama.window(config, kind)
        first = llama.attention(config, rotary=turned, window=window)
        layers.append(LayerPlan(first, second if sparse(config, number) else dense))
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
    second = experts(config, softmax(config, config.num_experts))
    return llama.stack(config, [LayerPlan(first, second)] * config.num_hidden_layers)


def experts(config: Any, router: RouterPlan, **changes: Any) -> ExpertsPlan:
    """A layer's second half; `changes` are fields of `ExpertsPlan`."""
    fields: dict[str, Any] = {
        "router": router,
        "stack": "mlp.experts",
        "activation": llama.activation(config.hidden_act),
        "before": llama.norm(config, "post_attention_layernorm"),
    }
    return ExpertsPlan(**fields | changes)


def softmax(config: Any, count: int, *, renormalised: bool | None = None) -> RouterPlan:
    """The router of Mixtral and Qwen."""
    if renormalised is None:
        renormalised = bool(config.norm_topk_prob)
    return RouterPlan("mlp.gate", count, config.num_experts_per_tok, renormalised)


def shared(config: Any, name: str, gate: str | None = None) -> SharedPlan:
    """The MLP that every position asks, a module of that name."""
    paths = (f"mlp.{name}.{one}_proj" for one in ("gate", "up", "down"))
    first, second, down = paths
    return SharedPlan((first, second), down, llama.activation(config.hidden_act), gate)


def sparse(config: Any, number: int) -> bool:
    """Whether a layer of Qwen's has experts."""
    steps = (number + 1) % config.decoder_sparse_step == 0
    return number not in config.mlp_only_layers and config.num_experts > 0 and steps
