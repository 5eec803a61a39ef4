"""gpt-oss: sinks in the softmax, every other layer with a window (transformers' `models/gpt_oss`)."""

from __future__ import annotations

from typing import Any

from mtl_lora_cli.engine.families import llama
from mtl_lora_cli.engine.plan import AttentionPlan, RotaryPlan


def attention(config: Any, layer_type: str) -> AttentionPlan:
    """The first half of a layer of that kind; biases are read from the modules."""
    llama.rotary(config)  # refuses kinds that follow the length
    return llama.attention(
        config,
        rotary=RotaryPlan(halved=True),
        sinks="self_attn",
        window=llama.window(config, layer_type),
    )
