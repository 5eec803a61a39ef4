"""OLMo 2 and 3: norms behind each half alone, and of q and k over all heads together.

Source: transformers' `models/olmo2` and `olmo3`. OLMo 3 has windows, and a rotary embedding for each kind of layer.
"""

from __future__ import annotations

from typing import Any

from mtl_lora_cli.engine.families import family, llama
from mtl_lora_cli.engine.plan import AttentionPlan, LayerPlan, MlpPlan, Plan


@family("olmo2")
def olmo2(config: Any) -> Plan:
    """OLMo 2."""
    layer = LayerPlan(_attention(config, rotary=llama.rotary(config)), _mlp(config))
    return llama.stack(config, [layer] * config.num_hidden_layers)


@family("olmo3")
def olmo3(config: Any) -> Plan:
    """OLMo 3: three layers with a window, then one without."""
    kinds = {
        kind: _attention(
            config, rotary=llama.rotary(config, kind), window=llama.window(config, kind)
        )
        for kind in set(llama.layer_types(config))
    }
    second = _mlp(config)
    return llama.stack(
        config, [LayerPlan(kinds[kind], second) for kind in llama.layer_types(config)]
    )


def _attention(config: Any, **changes: Any) -> AttentionPlan:
    return llama.attention(
        config,
        before=None,
        after=llama.norm(config, "post_attention_layernorm"),
        q_norm=llama.norm(config, "self_attn.q_norm"),
        k_norm=llama.norm(config, "self_attn.k_norm"),
        **changes,
    )


def _mlp(config: Any) -> MlpPlan:
    return llama.mlp(config, before=None, after=llama.norm(config, "post_feedforward_layernorm"))
