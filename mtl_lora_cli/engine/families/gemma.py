"""Gemma 1, 2 and 3 (transformers' `models/gemma`, `gemma2` and `gemma3`).

Norms are (1 + w) ⊙ x̂, of Gemma 2 and 3 before and behind each half; the activation is GELU by tanh; the
embedding scales itself. Gemma 2 caps scores and logits, Gemma 3 norms q and k and turns them by another
rotary embedding where a layer has a window.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from mtl_lora_cli.engine.families import family, llama
from mtl_lora_cli.engine.plan import LayerPlan, MlpPlan, NotPlanned, Plan

_norm = partial(llama.norm, plus_one=True)


@family("gemma")
def gemma(config: Any) -> Plan:
    """Gemma 1: LLaMA's layers but for 1 + w and GELU."""
    _require_causal(config)
    first = llama.attention(
        config, rotary=llama.rotary(config), before=_norm(config, "input_layernorm")
    )
    second = llama.mlp(config, before=_norm(config, "post_attention_layernorm"))
    layers = [LayerPlan(first, second)] * config.num_hidden_layers
    return llama.stack(config, layers, norm=_norm(config, "norm"))


@family("gemma2")
def gemma2(config: Any) -> Plan:
    """Gemma 2: every other layer has a window."""
    turned = llama.rotary(config)
    return _stack(
        config,
        {kind: {"rotary": turned} for kind in llama.layer_types(config)},
        softcap=config.attn_logit_softcapping,
    )


@family("gemma3_text")
def gemma3(config: Any) -> Plan:
    """Gemma 3: five layers with a window, then one without."""
    return _stack(
        config,
        {kind: {"rotary": llama.rotary(config, kind)} for kind in llama.layer_types(config)},
        q_norm=_norm(config, "self_attn.q_norm"),
        k_norm=_norm(config, "self_attn.k_norm"),
    )


def _stack(config: Any, kinds: dict[str, dict[str, Any]], **attention: Any) -> Plan:
    """Layers of some kinds, each with its changes, all with norms before and behind."""
    _require_causal(config)
    halves = {
        kind: llama.attention(
            config,
            scaling=config.query_pre_attn_scalar**-0.5,
            before=_norm(config, "input_layernorm"),
            after=_norm(config, "post_attention_layernorm"),
            window=llama.window(config, kind),
            **changes,
            **attention,
        )
        for kind, changes in kinds.items()
    }
    second = _mlp(config)
    return llama.stack(
        config,
        [LayerPlan(halves[kind], second) for kind in llama.layer_types(config)],
        norm=_norm(config, "norm"),
        logit_softcap=config.final_logit_softcapping,
    )


def _mlp(config: Any) -> MlpPlan:
    return llama.mlp(
        config,
        before=_norm(config, "pre_feedforward_layernorm"),
        after=_norm(config, "post_feedforward_layernorm"),
    )


def _require_causal(config: Any) -> None:
    if getattr(config, "use_bidirectional_attention", False):
        raise NotPlanned("attention to what comes later")
