"""Qwen 3.5 and Qwen 3 Next: three of four layers have a gated delta net, the fourth attention whose result is gated.

Norms are (1 + w) ⊙ x̂ (transformers' `models/qwen3_5`, `qwen3_5_moe` and `qwen3_next`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mtl_lora_cli.engine.families import family, llama, mixtures
from mtl_lora_cli.engine.plan import (
    AttentionPlan,
    ExpertsPlan,
    LayerPlan,
    MixerPlan,
    MlpPlan,
    NotPlanned,
    Plan,
)

_norm = partial(llama.norm, plus_one=True)
_CHUNK = 64  # positions that transformers' delta rule takes at a time
_APART = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
_TOGETHER = ("in_proj_qkvz", "in_proj_ba")


@family("qwen3_5_text")
def qwen3_5(config: Any) -> Plan:
    """Dense Qwen 3.5."""
    return _stack(config, _APART, [_dense(config)] * config.num_hidden_layers)


@family("qwen3_5_moe_text")
def qwen3_5_moe(config: Any) -> Plan:
    """Qwen 3.5 with experts in each layer."""
    second = _experts(config, renormalised=True)
    return _stack(config, _APART, [second] * config.num_hidden_layers)


@family("qwen3_next")
def qwen3_next(config: Any) -> Plan:
    """Qwen 3 Next; some layers may be dense."""
    second, dense = _experts(config, renormalised=config.norm_topk_prob), _dense(config)
    layers = range(config.num_hidden_layers)
    seconds = [second if mixtures.sparse(config, number) else dense for number in layers]
    return _stack(config, _TOGETHER, seconds)


def _stack(config: Any, inputs: tuple[str, ...], seconds: Sequence[MlpPlan | ExpertsPlan]) -> Plan:
    """Layers of both kinds, with their second halves.

    Args:
        config: of the model.
        inputs: names of the delta net's projections.
        seconds: of each layer.
    """
    firsts: dict[str, AttentionPlan | MixerPlan] = {
        "full_attention": _attention(config),
        "linear_attention": _delta_net(config, inputs),
    }
    other = next((kind for kind in config.layer_types if kind not in firsts), None)
    if other is not None:
        raise NotPlanned(f"layers of type {other}")
    each = zip(config.layer_types, seconds, strict=True)
    layers = [LayerPlan(firsts[kind], second) for kind, second in each]
    return llama.stack(config, layers, norm=_norm(config, "norm"))


def _dense(config: Any) -> MlpPlan:
    return llama.mlp(config, before=_norm(config, "post_attention_layernorm"))


def _experts(config: Any, *, renormalised: bool) -> ExpertsPlan:
    return mixtures.experts(
        config,
        mixtures.softmax(config, config.num_experts, renormalised=renormalised),
        before=_norm(config, "post_attention_layernorm"),
        shared=mixtures.shared(config, "shared_expert", "mlp.shared_expert_gate"),
    )


def _attention(config: Any) -> AttentionPlan:
    """Heads of q and k are normed, a part of them turns; each query has a gate beside it."""
    return llama.attention(
        config,
        before=_norm(config, "input_layernorm"),
        rotary=replace(llama.rotary(config), grids=1 if config.model_type == "qwen3_next" else 3),
        q_norm=_norm(config, "self_attn.q_norm"),
        k_norm=_norm(config, "self_attn.k_norm"),
        gates=True,
    )


def _delta_net(config: Any, inputs: tuple[str, ...]) -> MixerPlan:
    """A short convolution and the gated delta rule (arXiv 2412.06464)."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    wide_keys = config.linear_num_value_heads * config.linear_key_head_dim
    scores = config.linear_num_value_heads * _CHUNK
    return MixerPlan(
        module="linear_attn",
        qkv=tuple(f"linear_attn.{name}" for name in inputs),
        o="linear_attn.out_proj",
        working=7 * values + 6 * wide_keys + 2 * keys + 3 * scores,  # as measured, to a twentieth
        graph=11 * values + 12 * wide_keys + 3 * keys + 7 * scores,
        chunk=_CHUNK,
        before=_norm(config, "input_layernorm"),
    )
