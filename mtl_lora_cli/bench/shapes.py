"""Shapes of models: sizes without weights, for speed does not depend on what the weights are."""

from __future__ import annotations

import copy
from typing import Any

from mtl_lora_cli.errors import UsageError, did_you_mean
from mtl_lora_cli.resources import expanded


def _llama(
    width: int,
    inner: int,
    layers: int,
    heads: int,
    key_heads: int,
    vocabulary: int,
    *,
    theta: float = 10_000.0,
    tied: bool = False,
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
    }


_GRANITE = {"model_type": "granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.22}

SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": _llama(4096, 14336, 32, 32, 8, 128_256, theta=500_000.0),
    "llama3-70b": _llama(8192, 28672, 80, 64, 8, 128_256, theta=500_000.0),
    "llama3.2-3b": _llama(3072, 8192, 28, 24, 8, 128_256, theta=500_000.0, tied=True),
    "llama3.2-1b": _llama(2048, 8192, 16, 32, 8, 128_256, theta=500_000.0, tied=True),
    "llama2-7b": _llama(4096, 11008, 32, 32, 32, 32_000),
    "llama2-13b": _llama(5120, 13824, 40, 40, 40, 32_000),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49_152, theta=100_000.0, tied=True),
    "qwen3-8b": {
        **_llama(4096, 12288, 36, 32, 8, 151_936, theta=1_000_000.0),
        "model_type": "qwen3",
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
    },
    "qwen3-30b-a3b": {
        **_llama(2048, 6144, 48, 32, 4, 151_936, theta=1_000_000.0),
        "model_type": "qwen3_moe",
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
    "gpt-oss-20b": {
        **_llama(2880, 2880, 24, 64, 8, 201_088),
        "model_type": "gpt_oss",
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "max_position_embeddings": 131_072,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    "gemma3-4b": {
        **_llama(2560, 10240, 34, 8, 4, 262_208, tied=True),
        "model_type": "gemma3_text",
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        },
    },
    "gemma2-2b": {
        **_llama(2304, 9216, 26, 8, 4, 256_000, tied=True),
        "model_type": "gemma2",
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rms_norm_eps": 1e-6,
    },
    "smollm3-3b": {
        **_llama(2048, 11008, 36, 16, 4, 128_256, theta=5_000_000.0, tied=True),
        "model_type": "smollm3",
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "rms_norm_eps": 1e-6,
    },
    "olmo3-7b": {
        **_llama(4096, 11008, 32, 32, 32, 100_278, theta=500_000.0),
        "model_type": "olmo3",
        "sliding_window": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 500_000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "phi4-mini": {
        **_llama(3072, 8192, 32, 24, 8, 200_064, tied=True),
        "model_type": "phi3",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.75,
        },
        "pad_token_id": 0,
    },
    "granite-2b": {
        **_llama(2048, 8192, 40, 32, 8, 49_155, theta=10_000_000.0, tied=True),
        **_GRANITE,
        "attention_multiplier": 0.015625,
        "logits_scaling": 8.0,
    },
    "granite-8b": {
        **_llama(4096, 12800, 40, 32, 8, 49_155, theta=10_000_000.0, tied=True),
        **_GRANITE,
        "attention_multiplier": 0.0078125,
        "logits_scaling": 16.0,
    },
    "glm4-9b": {
        **_llama(4096, 13696, 40, 32, 2, 151_552),
        "model_type": "glm4",
        "head_dim": 128,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
        },
        "pad_token_id": 0,
    },
    "ministral3-8b": {
        **_llama(4096, 14336, 34, 32, 8, 131_072, theta=1_000_000.0),
        "model_type": "ministral3",
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16_384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "qwen2.5-7b": {
        **_llama(3584, 18944, 28, 28, 4, 152_064, theta=1_000_000.0),
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
    },
    "tiny": _llama(64, 128, 2, 4, 2, 256),
}


def require_shape(name: str) -> None:
    """Check a shape's name before anything heavy is loaded.

    Raises:
        UsageError: it is neither a known shape nor a folder with a `config.json`.
    """
    if name in SHAPES:
        return
    path = expanded(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"--shape: the folder '{name}' holds no config.json")
        return
    raise UsageError(
        f"--shape: '{name}' is neither a known shape nor a folder"
        f"{did_you_mean(name, SHAPES)}; shapes: {', '.join(SHAPES)}"
    )


def projections(name: str) -> dict[str, tuple[str, ...]]:
    """What `qkvo` and `all` mean in a shape: names of attention's projections, and of all of a layer's.

    Where no family has a plan for it, they are LLaMA's.

    Raises:
        UsageError: as `find_config`.
    """
    from mtl_lora_cli.engine.families import plan_of
    from mtl_lora_cli.engine.plan import NotPlanned

    try:
        plan = plan_of(find_config(name))
    except NotPlanned:
        plan = plan_of(find_config("tiny"))
    attention = [path for group in plan.attentions[0].groups for path in group]
    return {
        "qkvo": tuple(path.rpartition(".")[2] for path in attention),
        "all": plan.projections,
    }


def find_config(name: str) -> Any:
    """The transformers configuration of a shape, or of a folder's `config.json`.

    Raises:
        UsageError: there is no such shape, or the folder's file is no configuration of a model.
    """
    from transformers import AutoConfig

    require_shape(name)
    if name in SHAPES:
        return AutoConfig.for_model(**copy.deepcopy(SHAPES[name]))
    try:
        return AutoConfig.from_pretrained(expanded(name))
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"--shape: '{name}': its config.json cannot be read: {reason}") from None
