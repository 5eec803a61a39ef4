"""Gemma 4's dense text models (transformers' `models/gemma4` and `gemma4_unified`).

Norms before and behind each half, of each head of q, k and v; layers without a window have larger heads, and some
take values from the keys' projection; behind each layer the stream is multiplied by a number of its own.
The small models, which feed every layer an embedding of its own and share keys and values, run on the plain engine, and
so does the one with experts beside its MLPs.
"""

from __future__ import annotations

from typing import Any

from mtl_lora_cli.engine.families import family, llama
from mtl_lora_cli.engine.plan import AttentionPlan, LayerPlan, NotPlanned, Plan


@family("gemma4_text", "gemma4_unified_text")
def gemma4(config: Any) -> Plan:
    """Gemma 4 12B and 31B."""
    _require_dense(config)
    second = llama.mlp(
        config,
        before=llama.norm(config, "pre_feedforward_layernorm"),
        after=llama.norm(config, "post_feedforward_layernorm"),
    )
    layers = [
        LayerPlan(_attention(config, number, kind), second, scale="layer_scalar")
        for number, kind in enumerate(llama.layer_types(config))
    ]
    return llama.stack(config, layers, logit_softcap=config.final_logit_softcapping)


def _attention(config: Any, number: int, kind: str) -> AttentionPlan:
    own = config.per_layer_config[number]
    keys_are_values = config.attention_k_eq_v and kind == "full_attention"
    return llama.attention(
        own,
        scaling=1.0,
        qkv=tuple(f"self_attn.{name}_proj" for name in ("qk" if keys_are_values else "qkv")),
        after=llama.norm(config, "post_attention_layernorm"),
        q_norm=llama.norm(config, "self_attn.q_norm"),
        k_norm=llama.norm(config, "self_attn.k_norm"),
        value_eps=config.rms_norm_eps,
        keys_are_values=keys_are_values,
        rotary=llama.rotary(config, kind),
        window=llama.window(config, kind),
    )


def _require_dense(config: Any) -> None:
    if getattr(config, "hidden_size_per_layer_input", None):
        raise NotPlanned("an embedding of its own for each layer (Gemma 4 E2B and E4B)")
    if config.num_kv_shared_layers:
        raise NotPlanned("layers that share keys and values")
    if getattr(config, "enable_moe_block", False):
        raise NotPlanned("experts beside the MLP (Gemma 4 26B-A4B)")
    if config.use_bidirectional_attention == "all":
        raise NotPlanned("attention to what comes later")
