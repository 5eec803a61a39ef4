"""Qwen 3: LLaMA's layers with norms of each head of q and k (transformers' `models/qwen3`)."""

from __future__ import annotations

from typing import Any

from mtl_lora_cli.engine.families import family, llama
from mtl_lora_cli.engine.plan import LayerPlan, Plan


@family("qwen3")
def qwen3(config: Any) -> Plan:
    """Dense Qwen 3; windows where the configuration says so."""
    turned, second = llama.rotary(config), llama.mlp(config)
    kinds = {
        kind: llama.attention(
            config,
            rotary=turned,
            q_norm=llama.norm(config, "self_attn.q_norm"),
            k_norm=llama.norm(config, "self_attn.k_norm"),
            window=llama.window(config, kind),
        )
        for kind in set(llama.layer_types(config))
    }
    return llama.stack(
        config, [LayerPlan(kinds[kind], second) for kind in llama.layer_types(config)]
    )
