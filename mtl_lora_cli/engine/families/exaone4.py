"""EXAONE 4: norms behind each half alone, and of each head of q and k (transformers' `models/exaone4`)."""

from __future__ import annotations

from typing import Any

from mtl_lora_cli.engine.families import family, llama
from mtl_lora_cli.engine.plan import LayerPlan, Plan


@family("exaone4")
def exaone4(config: Any) -> Plan:
    """Where some layers have a window, the others turn nothing."""
    turned = llama.rotary(config)
    second = llama.mlp(config, before=None, after=llama.norm(config, "post_feedforward_layernorm"))
    kinds = {
        kind: llama.attention(
            config,
            before=None,
            after=llama.norm(config, "post_attention_layernorm"),
            q_norm=llama.norm(config, "self_attn.q_norm"),
            k_norm=llama.norm(config, "self_attn.k_norm"),
            rotary=turned if config.sliding_window is None or kind == "sliding_attention" else None,
            window=llama.window(config, kind),
        )
        for kind in set(llama.layer_types(config))
    }
    return llama.stack(
        config, [LayerPlan(kinds[kind], second) for kind in llama.layer_types(config)]
    )
