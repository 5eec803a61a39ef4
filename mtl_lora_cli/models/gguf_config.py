"""What a GGUF file says of its model, and what transformers takes over of it.

transformers reads a part of a file's keys, passes over the others and over tensors that it has no name for, and takes its own
defaults in their place: another rotary embedding, no window, experts of random numbers. Here every key of
the model is taken over or refused, and every value of every tensor has to be in the model.

Which key means what: the constants of gguf (`gguf.constants.Keys`), and the converter and the models of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mtl_lora_cli.errors import UsageError

_NO_SUMS = (  # what shapes of tensors say, too, and what nothing is computed with
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "vocab_size",
)
_OF_TENSORS = {
    "stablelm": ("use_parallel_residual",)
}  # transformers sees it, and a converter wrote it unasked
_NONE_AT_0 = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
_NOTHING = {
    "attention.head_count": (0,),
    "attention.head_count_kv": (0,),
    "ssm.dt_b_c_rms": (False,),
}
_EPSILONS = ("layer_norm_eps", "norm_epsilon", "layer_norm_epsilon", "norm_eps")
_ATTRIBUTES: dict[str, tuple[str, ...]] = {  # key → what a configuration may call it
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": _EPSILONS,
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", *_EPSILONS),
    "attention.sliding_window": ("sliding_window",),
    "attention.value_length": ("head_dim",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "use_parallel_residual": ("use_parallel_residual",),
}
_ROPE = ("rope.freq_base", "rope.dimension_count", "rope.freq_base_swa", "rope.scaling.type")
_SCALED = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
_SCALINGS = {"none": 0, "linear": 1, "yarn": 2}  # kind → how many keys say all of it
_LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}  # by which llama.cpp knows it
_BASE = 10_000.0  # of rotary positions, where no key says another one
_FREQUENCIES = "rope_freqs.weight"


def take_over(reader: Any, config: Any, read: Mapping[str, str | None]) -> None:
    """Give a configuration what its file says and transformers leaves out.

    Args:
        reader: gguf's, of the file.
        config: as transformers has read it; it is changed.
        read: keys of this architecture that transformers reads itself → what it calls them, None: it passes over them.

    Raises:
        UsageError: the file says something that is not known here.
    """
    said = _said(reader)
    for key, value in said.items():
        names = [name for name in _ATTRIBUTES.get(key, ()) if hasattr(config, name)]
        if read.get(key) or key in _NO_SUMS or key in _ROPE or key in _SCALED:
            continue
        if key in _OF_TENSORS.get(config.model_type, ()):
            continue
        if key == "attention.sliding_window" and value and not _slides(config):
            raise UsageError(f"its key '{key}' ({value!r:.40}) is not known here for this model")
        if names:
            setattr(config, names[0], value if value or key not in _NONE_AT_0 else None)
        elif value not in _NOTHING.get(key, ()) and not _same_heads(key, said):
            raise UsageError(f"its key '{key}' ({value!r:.40}) is not known here for this model")
    if config.model_type == "gpt2":  # transformers gives them names that its own code does not read
        config.n_positions, config.n_inner = said["context_length"], said["feed_forward_length"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for flag, name in (("attention_bias", "attn_output"), ("mlp_bias", "ffn_up")):
        if hasattr(config, flag):
            setattr(config, flag, f"blk.0.{name}.bias" in tensors)
    if config.model_type in _LAYERS_OF_27B:
        config.query_pre_attn_scalar = _queries_divided_by(config)
    _take_over_rotary(said, config)
    if _FREQUENCIES in tensors:
        _take_over_frequencies(tensors[_FREQUENCIES].data, config)


def require_all_read(reader: Any, model: Any, loading: Mapping[str, Any]) -> None:
    """Refuse a model that has not all that the file holds, or more.

    Args:
        reader: gguf's, of the file.
        model: as transformers has loaded it.
        loading: what it says of that: `missing_keys` and `mismatched_keys`.

    Raises:
        UsageError: which weight is not there, or how many numbers nobody has read.
    """
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UsageError(f"{len(missing)} weights are not in it, the first is {missing[0]}")
    for name, held, wanted in sorted(loading["mismatched_keys"]):
        raise UsageError(
            f"its weight '{name}' has shape {list(held)}, by its keys it would have {list(wanted)}"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    passed = {_FREQUENCIES, *_copied_head(tensors, model.config)}
    held = sum(
        math.prod(int(size) for size in tensor.shape)
        for name, tensor in tensors.items()
        if name not in passed
    )
    kept = {weight.data_ptr(): weight.numel() for weight in model.state_dict().values()}
    if held != sum(kept.values()):
        raise UsageError(
            f"its tensors have {held:,} values, and transformers' model of type "
            f"'{model.config.model_type}' has {sum(kept.values()):,}"
        )


def _copied_head(tensors: Mapping[str, Any], config: Any) -> tuple[str, ...]:
    """The output layer, where the model has none of its own and the file a copy of the embedding in its place."""
    head, embedding = tensors.get("output.weight"), tensors.get("token_embd.weight")
    if not config.tie_word_embeddings or head is None or embedding is None:
        return ()
    return ("output.weight",) if np.array_equal(head.data, embedding.data) else ()


def _slides(config: Any) -> bool:
    """Whether a window has an effect: in some families another key switches it on, which no file says."""
    return hasattr(config, "sliding_window") and getattr(config, "use_sliding_window", True)


def _said(reader: Any) -> dict[str, Any]:
    """The keys of the model itself, without its architecture's name, and their values."""
    parts = reader.fields.get("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise UsageError(
            f"it is one of {parts.contents()} parts; llama.cpp's `llama-gguf-split --merge` makes one file of them"
        )
    start = f"{reader.fields['general.architecture'].contents()}."
    return {
        name.removeprefix(start): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(start)
    }


def _same_heads(key: str, said: Mapping[str, Any]) -> bool:
    """Whether it says of a model without groups of heads that it has none."""
    return key == "attention.head_count_kv" and said[key] == said.get("attention.head_count")


def _queries_divided_by(config: Any) -> int:
    """The square of what scores are divided by: no key has it, llama.cpp goes by the number of layers."""
    if config.num_hidden_layers == _LAYERS_OF_27B[config.model_type]:
        return int(config.hidden_size // config.num_attention_heads)
    return int(config.head_dim)


def _take_over_rotary(said: Mapping[str, Any], config: Any) -> None:
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    unnamed = "linear" if "rope.scaling.factor" in said else "none"  # as llama.cpp has it
    kind = str(said.get("rope.scaling.type", unnamed))
    scaling = {name: said[key] for key, name in _SCALED.items() if key in said and kind != "none"}
    if kind not in _SCALINGS or len(scaling) != _SCALINGS[kind]:
        raise UsageError(f"rotary positions of type '{kind}' with {scaling} are not known here")
    if kind != "none":
        scaling["rope_type"] = kind
    own = {"rope_theta": said.get("rope.freq_base", _BASE)}
    parts: dict[str, dict[str, Any]] = {
        "full_attention": own | scaling,
        "sliding_attention": {},
    }
    if "rope.freq_base_swa" in said:
        parts["sliding_attention"] = {"rope_theta": said["rope.freq_base_swa"]}
    if "full_attention" in parameters:
        config.rope_parameters = {name: {**parameters[name], **parts[name]} for name in parameters}
        return
    config.rope_parameters = {**parameters, **own, **scaling}
    if "rope.dimension_count" in said:
        heads = getattr(config, "num_attention_heads", 1)
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        count, some = said["rope.dimension_count"], "partial_rotary_factor"
        if some in parameters:
            config.rope_parameters[some] = count / width
        elif count != width:
            raise UsageError(
                f"its key 'rope.dimension_count' ({count} of {width}) is not known here for this model"
            )


def _take_over_frequencies(factors: Any, config: Any) -> None:
    """LLaMA 3.1's scaling of positions, of which a file holds what each frequency is divided by.

    Short waves stay, long ones are divided by `factor`; between them lies 1 / f = (1 − s) / factor + s with
    s = (original / wave length − 1) / (4 − 1), which tells `original`.

    Raises:
        UsageError: the numbers are no such scaling.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = np.asarray(factors, dtype=np.float64).ravel()
    plain = config.rope_parameters
    if plain.get("rope_type") != "default":
        raise UsageError(f"its tensor '{_FREQUENCIES}' is not known here for this model")
    waves = 2 * math.pi * plain["rope_theta"] ** (np.arange(len(found)) / len(found))
    factor = float(found.max())
    between = np.flatnonzero((found > 1.001) & (found < 0.999 * factor))
    share = (1 / found[between] - 1 / factor) / (1 - 1 / factor) if len(between) else np.array([])
    originals = [8192, *(round(one) for one in waves[between] * (1 + 3 * share))]
    for original in originals:
        config.rope_parameters = {
            **plain,
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        own = 2 * math.pi / waves / scaled.double().numpy() if len(scaled) == len(found) else 0
        if np.allclose(own, found, rtol=1e-4):
            return
    raise UsageError(f"its tensor '{_FREQUENCIES}' is no scaling of positions that is known here")
