"""Granite: LLaMA's layers with four multipliers (transformers' `models/granite`)."""

from __future__ import annotations

from typing import Any

from mtl_lora_cli.engine.families import family, llama
from mtl_lora_cli.engine.plan import LayerPlan, Plan


@family("granite")
def granite(config: Any) -> Plan:
    """Of embeddings, scores, what each block adds, and logits."""
    added = float(config.residual_multiplier)
    first = llama.attention(
        config,
        rotary=llama.rotary(config),
        scaling=float(config.attention_multiplier),
        multiplier=added,
    )
    layer = LayerPlan(first, llama.mlp(config, multiplier=added))
    return llama.stack(
        config,
        [layer] * config.num_hidden_layers,
        embedding_multiplier=float(config.embedding_multiplier),
        logit_multiplier=1 / float(config.logits_scaling),
    )
