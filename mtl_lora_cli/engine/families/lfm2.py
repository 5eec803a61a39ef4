"""LFM 2, dense: layers of short convolutions between layers of attention (transformers' `models/lfm2`)."""

from __future__ import annotations

from typing import Any

from mtl_lora_cli.engine.families import family, llama
from mtl_lora_cli.engine.plan import (
    AttentionPlan,
    LayerPlan,
    MixerPlan,
    MlpPlan,
    NotPlanned,
    Plan,
)


@family("lfm2")
def lfm2(config: Any) -> Plan:
    """Heads of q and k are normed; a convolution is gated on both sides."""
    second = MlpPlan(
        gate_up=("feed_forward.w1", "feed_forward.w3"),
        down="feed_forward.w2",
        activation="silu",
        before=llama.norm(config, "ffn_norm"),
    )
    firsts: dict[str, AttentionPlan | MixerPlan] = {
        "full_attention": _attention(config),
        "conv": _convolution(config),
    }
    other = next((kind for kind in config.layer_types if kind not in firsts), None)
    if other is not None:
        raise NotPlanned(f"layers of type {other}")
    layers = [LayerPlan(firsts[kind], second) for kind in config.layer_types]
    return llama.stack(config, layers, norm=llama.norm(config, "embedding_norm"))


def _attention(config: Any) -> AttentionPlan:
    return llama.attention(
        config,
        o="self_attn.out_proj",
        before=llama.norm(config, "operator_norm"),
        q_norm=llama.norm(config, "self_attn.q_layernorm"),
        k_norm=llama.norm(config, "self_attn.k_layernorm"),
        rotary=llama.rotary(config),
    )


def _convolution(config: Any) -> MixerPlan:
    return MixerPlan(
        module="conv",
        qkv=("conv.in_proj",),
        o="conv.out_proj",
        working=4 * config.hidden_size,
        graph=10 * config.hidden_size,
        chunk=1,
        before=llama.norm(config, "operator_norm"),
    )
