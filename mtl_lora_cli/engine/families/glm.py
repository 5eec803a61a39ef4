"""GLM 4: neighbours of a part of each head turn; gate and up in one matrix (transformers' `models/glm`, `glm4`)."""

from __future__ import annotations

from typing import Any

from mtl_lora_cli.engine.families import family, llama
from mtl_lora_cli.engine.plan import LayerPlan, Plan

_GATE_UP = ("mlp.gate_up_proj",)


@family("glm")
def glm(config: Any) -> Plan:
    """GLM-4-9B and its edge models."""
    first = llama.attention(config, rotary=llama.rotary(config, pairs=True))
    layer = LayerPlan(first, llama.mlp(config, gate_up=_GATE_UP))
    return llama.stack(config, [layer] * config.num_hidden_layers)


@family("glm4")
def glm4(config: Any) -> Plan:
    """GLM-4-0414: with norms behind each half, too."""
    first = llama.attention(
        config,
        rotary=llama.rotary(config, pairs=True),
        after=llama.norm(config, "post_self_attn_layernorm"),
    )
    second = llama.mlp(config, gate_up=_GATE_UP, after=llama.norm(config, "post_mlp_layernorm"))
    return llama.stack(config, [LayerPlan(first, second)] * config.num_hidden_layers)
