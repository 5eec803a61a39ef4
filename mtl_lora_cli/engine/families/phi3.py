"""Phi 3 and 4: q, k and v in one matrix, gate and up in another (transformers' `models/phi3`)."""

from __future__ import annotations

from typing import Any

from mtl_lora_cli.engine.families import family, llama
from mtl_lora_cli.engine.plan import LayerPlan, NotPlanned, Plan


@family("phi3")
def phi3(config: Any) -> Plan:
    """The rotary embedding may turn the first part of each head alone."""
    if config.resid_pdrop:
        raise NotPlanned("dropout of what a block adds")
    first = llama.attention(
        config,
        rotary=llama.rotary(config),
        window=config.sliding_window,
        qkv=("self_attn.qkv_proj",),
    )
    second = llama.mlp(config, gate_up=("mlp.gate_up_proj",))
    return llama.stack(config, [LayerPlan(first, second)] * config.num_hidden_layers)
