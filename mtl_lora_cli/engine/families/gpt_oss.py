"""gpt-oss: sinks in the softmax, every other layer with a window; experts with biases and a clamped activation.

Its stacks of experts are transposed, and their gates and ups neighbours (transformers' `models/gpt_oss`).
"""

from __future__ import annotations

from typing import Any

from mtl_lora_cli.engine.families import family, llama
from mtl_lora_cli.engine.families.mixtures import experts
from mtl_lora_cli.engine.plan import AttentionPlan, LayerPlan, Plan, RotaryPlan, RouterPlan
from mtl_lora_cli.kernels.clamped import Clamped


@family("gpt_oss")
def gpt_oss(config: Any) -> Plan:
    """gpt-oss 20B and 120B."""
    router = RouterPlan(
        "mlp.router", config.num_local_experts, config.num_experts_per_tok, renormalised=True
    )
    activation = Clamped(
        alpha=getattr(config, "swiglu_alpha", 1.702), limit=getattr(config, "swiglu_limit", 7.0)
    )
    second = experts(config, router, activation=activation, transposed=True)
    layers = [LayerPlan(attention(config, kind), second) for kind in llama.layer_types(config)]
    return llama.stack(config, layers)


def attention(config: Any, kind: str) -> AttentionPlan:
    """The first half of a layer of that kind; biases are read from the modules."""
    llama.rotary(config)  # refuses kinds that follow the length
    return llama.attention(
        config,
        rotary=RotaryPlan(halved=True),
        window=llama.window(config, kind),
        sinks="self_attn",
    )
