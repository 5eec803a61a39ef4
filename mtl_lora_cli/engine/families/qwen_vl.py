"""The language parts of Qwen2.5-VL and Qwen3-VL: Qwen 2's and Qwen 3's layers, turned by places in three dimensions
(transformers' `models/qwen2_5_vl` and `qwen3_vl`).

What Qwen3-VL adds to the stream behind its first layers is `decoder.Deeper`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mtl_lora_cli.engine.families import family, llama
from mtl_lora_cli.engine.plan import LayerPlan, NotPlanned, Plan, RotaryPlan


@family("qwen2_5_vl_text")
def qwen2_5_vl(config: Any) -> Plan:
    """Qwen2.5-VL: biases on q, k and v."""
    return _stack(config)


@family("qwen3_vl_text")
def qwen3_vl(config: Any) -> Plan:
    """Qwen3-VL: norms of each head of q and k."""
    norms = {f"{name}_norm": llama.norm(config, f"self_attn.{name}_norm") for name in "qk"}
    return _stack(config, **norms)


def _stack(config: Any, **changes: Any) -> Plan:
    turned, second = _rotary(config), llama.mlp(config)
    kinds = {
        kind: llama.attention(config, rotary=turned, window=llama.window(config, kind), **changes)
        for kind in set(llama.layer_types(config))
    }
    layers = [LayerPlan(kinds[kind], second) for kind in llama.layer_types(config)]
    return llama.stack(config, layers)


def _rotary(config: Any) -> RotaryPlan:
    """Raises:
    NotPlanned: its frequencies are others beyond a limit, which places in three dimensions do not have.
    """
    found = llama.rotary(config)
    if found.limit is not None:
        raise NotPlanned("a rotary embedding in three dimensions with a limit")
    return replace(found, grids=3)
