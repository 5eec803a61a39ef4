"""LLaMA, and the parts of it that other families take over.

Norms before each half, rotary halves, SwiGLU: transformers' `models/llama`, `mistral` and `qwen2`, which differ
in biases, which the blocks read from the modules, and in windows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mtl_lora_cli.engine.families import family
from mtl_lora_cli.engine.plan import (
    AttentionPlan,
    LayerPlan,
    MlpPlan,
    NormPlan,
    NotPlanned,
    Plan,
    QueryScale,
    RotaryPlan,
)
from mtl_lora_cli.kernels.gated import Activation

_ROPE_TYPES = (
    "default",
    "linear",
    "llama3",
    "yarn",
    "longrope",
    "proportional",
)  # fixed, or one of two sets
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def attention(config: Any, **changes: Any) -> AttentionPlan:
    """LLaMA's first half; `changes` are fields of `AttentionPlan`."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    fields: dict[str, Any] = {
        "heads": heads,
        "key_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": head_dim,
        "scaling": head_dim**-0.5,
        "qkv": tuple(f"self_attn.{name}_proj" for name in "qkv"),
        "o": "self_attn.o_proj",
        "before": norm(config, "input_layernorm"),
    }
    return AttentionPlan(**fields | changes)


def mlp(config: Any, **changes: Any) -> MlpPlan:
    """LLaMA's second half; `changes` are fields of `MlpPlan`."""
    name = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    fields: dict[str, Any] = {
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": "mlp.down_proj",
        "activation": activation(name),
        "before": norm(config, "post_attention_layernorm"),
    }
    return MlpPlan(**fields | changes)


def norm(config: Any, path: str, *, plus_one: bool = False) -> NormPlan:
    """A norm with the configuration's ε."""
    eps = getattr(config, "rms_norm_eps", None)
    return NormPlan(path, config.norm_eps if eps is None else eps, plus_one)


def activation(name: str | None) -> Activation:
    """The engine's name for transformers' activation.

    Raises:
        NotPlanned: there is none.
    """
    if name not in _ACTIVATIONS:
        raise NotPlanned(f"activation {name}")
    return _ACTIVATIONS[name]


def rotary(config: Any, layer_type: str | None = None, *, pairs: bool = False) -> RotaryPlan:
    """The model's rotary embedding, of one kind of layers where each kind has its own.

    Raises:
        NotPlanned: its frequencies follow the length of what is read.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    if layer_type is not None:
        parameters = parameters[layer_type]
    kind = parameters.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise NotPlanned(f"rotary embedding of type {kind}")
    limit = parameters["original_max_position_embeddings"] if kind == "longrope" else None
    return RotaryPlan(layer_type=layer_type, pairs=pairs, limit=limit)


def layer_types(config: Any) -> list[str]:
    """The kind of each layer; where the configuration names none, all layers see everything."""
    named = getattr(config, "layer_types", None)
    return list(named or ["full_attention"] * config.num_hidden_layers)


def window(config: Any, layer_type: str) -> int | None:
    """The window of a layer of that kind.

    Raises:
        NotPlanned: it is a kind of another sort.
    """
    if layer_type not in ("full_attention", "sliding_attention"):
        raise NotPlanned(f"layers of type {layer_type}")
    return config.sliding_window if layer_type == "sliding_attention" else None


def stack(config: Any, layers: Iterable[LayerPlan], **changes: Any) -> Plan:
    """Those layers, and LLaMA's last norm; `changes` are fields of `Plan`."""
    fields: dict[str, Any] = {"layers": tuple(layers), "norm": norm(config, "norm")}
    return Plan(**fields | changes)


@family("llama")
def llama(config: Any) -> Plan:
    """LLaMA 1 to 3, SmolLM, and others of that type."""
    layer = LayerPlan(attention(config, rotary=rotary(config)), mlp(config))
    return stack(config, [layer] * config.num_hidden_layers)


@family("mistral")
def mistral(config: Any) -> Plan:
    """Mistral 7B and later: one window for all layers, or none."""
    half = attention(config, rotary=rotary(config), window=config.sliding_window)
    return stack(config, [LayerPlan(half, mlp(config))] * config.num_hidden_layers)


@family("qwen2")
def qwen2(config: Any) -> Plan:
    """Qwen 2 and 2.5: biases on q, k and v; windows where the configuration says so."""
    turned = rotary(config)
    kinds = {
        kind: LayerPlan(attention(config, rotary=turned, window=window(config, kind)), mlp(config))
        for kind in set(layer_types(config))
    }
    return stack(config, [kinds[kind] for kind in layer_types(config)])


@family("ministral", "cwm")
def ministral(config: Any) -> Plan:
    """Ministral and CWM: the configuration says which layers have the window."""
    return qwen2(config)


@family("ministral3")
def ministral3(config: Any) -> Plan:
    """Ministral 3: Mistral's layers, whose later queries are scaled."""
    beta = config.rope_parameters.get("llama_4_scaling_beta")
    limit = config.rope_parameters.get("original_max_position_embeddings")
    half = attention(
        config,
        rotary=rotary(config),
        window=getattr(config, "sliding_window", None),
        query_scale=QueryScale(beta, limit) if beta and limit else None,
    )
    return stack(config, [LayerPlan(half, mlp(config))] * config.num_hidden_layers)
