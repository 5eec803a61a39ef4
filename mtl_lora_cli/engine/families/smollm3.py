"""SmolLM 3: LLaMA's layers, some of which turn nothing (transformers' `models/smollm3`)."""

from __future__ import annotations

from typing import Any

from mtl_lora_cli.engine.families import family, llama
from mtl_lora_cli.engine.plan import LayerPlan, Plan


@family("smollm3")
def smollm3(config: Any) -> Plan:
    """`no_rope_layers` has a 1 for each layer that turns q and k."""
    turned, second = llama.rotary(config), llama.mlp(config)
    layers = []
    # A smaller model's configuration may keep the longer list.
    for turns, kind in zip(config.no_rope_layers, llama.layer_types(config), strict=False):
        width = llama.window(config, kind) if config.use_sliding_window else None
        first = llama.attention(config, rotary=turned if turns else None, window=width)
        layers.append(LayerPlan(first, second))
    return llama.stack(config, layers)
