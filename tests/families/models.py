"""Tiny models of every kind: what is declared here is all that the tests know of a family.

A line is one model: its `model_type`, a word for the variant, and the keys of its configuration that
differ from `COMMON`. Of `COMMON` a configuration takes what it knows; so most lines are short, and a new
family is one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 512
WINDOW = 32  # most examples are longer, some are as long, some are shorter

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": WINDOW,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,  # of short keys more would be alike than float32 can tell apart
    "linear_value_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
    "vision_output_dim": 64,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
}


@dataclass(frozen=True)
class Tiny:
    """One tiny model.

    Attributes:
        model_type: as transformers calls it.
        variant: what is special about it; empty where nothing is.
        config: keys of its configuration, beside `COMMON`.
        text, vision: keys of the parts of a model that also sees; None where it has no such parts.
        targets: ends of the paths of the layers that are adapted; empty: all linear layers of the text
            part but the output layer.
        gain: of a matrix: without it attention is all but even, and logits all but equal; less where
            transformers' own float32 would be further than the tests' tolerance from its float64.
        refused: what the one line says where this model is refused; empty where it is not.
        not_for_peft: what the one line says where PEFT cannot name the adapted layers; empty where it can.
        quick: it belongs to the part that CI runs.
    """

    model_type: str
    variant: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] | None = None
    vision: Mapping[str, Any] | None = None
    targets: tuple[str, ...] = ()
    gain: float = 1.5
    refused: str = ""
    not_for_peft: str = ""
    quick: bool = False

    def __str__(self) -> str:
        return "-".join([self.model_type, *self.variant.replace(",", "").split()])


def tiny(
    model_type: str,
    variant: str = "",
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    targets: tuple[str, ...] = (),
    gain: float = 1.5,
    refused: str = "",
    not_for_peft: str = "",
    quick: bool = False,
    **config: Any,
) -> Tiny:
    """A line of the table."""
    return Tiny(
        model_type, variant, config, text, vision, targets, gain, refused, not_for_peft, quick
    )


WHOLE = {"sliding_window": None}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"]}
UNWINDOWED = {"layer_types": ["full_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
QWEN_WINDOW = {"use_sliding_window": True, "max_window_layers": 1}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}


def rope(kind: str, **keys: Any) -> dict[str, Any]:
    """A configuration's rotary embedding."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **keys}}


MINISTRAL_ROPE = rope(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=64,
    llama_4_scaling_beta=0.1,
    mscale=1.0,
    mscale_all_dim=1.0,
)

INDEXED = {"num_key_value_heads": 4, "index_n_heads": 16, "index_head_dim": 16}
QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
}
LONGCAT = {"head_dim": 8, "num_key_value_heads": 4, "moe_topk": 2, "zero_expert_num": 2}

FALCON = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
PEFT = "PEFT cannot adapt these layers"
MAMBA = ("in_proj", "out_proj", "x_proj")

MODELS: tuple[Tiny, ...] = (
    # The fused engine's layers.
    tiny("llama", quick=True),
    tiny("llama", "tied, biases", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    tiny("llama", "wide heads", head_dim=32),
    tiny("llama", "linear rope", **rope("linear", factor=4.0)),
    tiny(
        "llama",
        "llama3 rope",
        **rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    tiny("llama", "yarn", **rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    tiny("llama", "dynamic rope", max_position_embeddings=128, **rope("dynamic", factor=4.0)),
    tiny("llama", "longrope", rope_parameters=LONG, quick=True),
    tiny("mistral", **WHOLE),
    tiny("mistral", "window", quick=True),
    tiny("qwen2", tie_word_embeddings=True, **WHOLE, quick=True),
    tiny("qwen2", "window", **QWEN_WINDOW),
    # Attention as usual, with norms, biases, rotary parts and activations of their own.
    tiny("qwen3", **WHOLE, quick=True),
    tiny("qwen3", "window", **QWEN_WINDOW),
    tiny("gemma"),
    tiny("phi", quick=True),
    tiny("phi3", **WHOLE),
    tiny("phi3", "window"),
    tiny(
        "phi3",
        "longrope",
        rope_parameters=LONG,
        original_max_position_embeddings=64,
        **WHOLE,
        quick=True,
    ),
    tiny("olmo", clip_qkv=2.0),
    tiny("olmo2"),
    tiny("olmo3", **UNWINDOWED),
    tiny("olmo3", "window", **WINDOWED, quick=True),
    tiny("smollm3", **WHOLE, no_rope_layers=[1, 0]),
    tiny("smollm3", "window", use_sliding_window=True, **WINDOWED, no_rope_layers=[1, 0]),
    tiny("glm"),
    tiny("glm4"),
    tiny("ministral", **UNWINDOWED),
    tiny("ministral", "window", **WINDOWED),
    tiny("ministral3", **MINISTRAL_ROPE, **WHOLE),
    tiny("ministral3", "window", **MINISTRAL_ROPE),
    tiny("starcoder2", **WHOLE),
    tiny("starcoder2", "window"),
    tiny("exaone4", **UNWINDOWED),
    tiny("exaone4", "window", **WINDOWED),
    tiny("gpt_neox"),
    tiny("gpt_neox_japanese", intermediate_multiple_size=2),
    tiny("gpt_bigcode"),
    tiny("gpt_neo", gain=1.0, attention_types=[[["global"], 2]], num_layers=2, num_heads=4),
    tiny(
        "gpt_neo",
        "window",
        gain=1.0,
        attention_types=[[["global", "local"], 1]],
        num_layers=2,
        num_heads=4,
        window_size=WINDOW,
    ),
    tiny("gptj", rotary_dim=8, quick=True),
    tiny("codegen", rotary_dim=8),
    tiny("gpt2", refused="Conv1D", targets=("c_attn",), quick=True),
    tiny("opt", quick=True),
    tiny("biogpt"),
    tiny("xglm"),
    tiny("helium"),
    tiny("persimmon"),
    tiny("stablelm", quick=True),
    tiny("stablelm", "parallel", use_parallel_residual=True, use_qkv_bias=True, qk_layernorm=True),
    tiny("nemotron", gain=1.0),
    tiny("ernie4_5"),
    tiny("hunyuan_v1_dense"),
    tiny("seed_oss"),
    tiny("apertus"),
    tiny("arcee"),
    tiny("internlm3"),
    tiny("nanochat", quick=True),
    tiny("bitnet"),
    tiny("diffllama"),
    tiny("jais2"),
    tiny("cwm", **UNWINDOWED),
    tiny("cwm", "window", **WINDOWED),
    tiny("modernbert-decoder", "window", local_attention=2 * WINDOW, **WINDOWED),
    tiny("minicpm3", dim_model_base=64, num_key_value_heads=4),
    tiny("hyperclovax", logits_scaling=0.5),
    # Scaled logits, soft caps, sinks.
    tiny("granite", attention_multiplier=0.25),
    tiny(
        "granite",
        "scales",
        logits_scaling=2.0,
        attention_multiplier=0.1,
        residual_multiplier=0.5,
        embedding_multiplier=4.0,
        quick=True,
    ),
    tiny(
        "granite_swa",
        "window, sinks",
        logits_scaling=2.0,
        attention_multiplier=0.25,
        **WINDOWED,
        quick=True,
    ),
    tiny("cohere", logit_scale=0.5, quick=True),
    tiny("cohere", "scale 1", logit_scale=1.0),
    tiny("cohere2", logit_scale=0.5, **UNWINDOWED),
    tiny("cohere2", "window", logit_scale=0.5, **WINDOWED, quick=True),
    tiny(
        "gemma2", "no caps", final_logit_softcapping=None, attn_logit_softcapping=None, **UNWINDOWED
    ),
    tiny("gemma2", "caps", final_logit_softcapping=5.0, attn_logit_softcapping=5.0, **UNWINDOWED),
    tiny(
        "gemma2",
        "window, caps",
        final_logit_softcapping=5.0,
        attn_logit_softcapping=5.0,
        **WINDOWED,
        quick=True,
    ),
    tiny("vaultgemma", "window, caps", attn_logit_softcapping=5.0, **WINDOWED),
    tiny("gemma3_text", **UNWINDOWED),
    tiny("gemma3_text", "window", **WINDOWED, quick=True),
    tiny("gemma3_text", "window, cap", final_logit_softcapping=5.0, **WINDOWED),
    tiny(
        "gemma3n_text",
        "window, cap",
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=16,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        laurel_rank=8,
        intermediate_size=[128] * 4,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        final_logit_softcapping=5.0,
    ),
    tiny(
        "gemma4_text",
        "window, cap",
        global_head_dim=16,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=16,
        final_logit_softcapping=5.0,
        **WINDOWED,
    ),
    tiny("gemma4_text", "dense", global_head_dim=16, hidden_size_per_layer_input=0, **WINDOWED),
    tiny(
        "gemma4_text",
        "shared keys",
        global_head_dim=16,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=16,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        quick=True,
    ),
    tiny(
        "gemma4_text",
        "experts",
        global_head_dim=16,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        top_k_experts=2,
        **WINDOWED,
    ),
    tiny(
        "gemma4_unified_text",
        "k = v",
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        global_head_dim=16,
        **WINDOWED,
    ),
    tiny("gpt_oss", "no window", **UNWINDOWED),
    tiny("gpt_oss", "window, sinks", **WINDOWED, quick=True),
    # Mixtures of experts.
    tiny("qwen3_moe", **WHOLE),
    tiny("qwen2_moe", **WHOLE, quick=True),
    tiny("mixtral", **WHOLE, quick=True),
    tiny("mixtral", "window"),
    tiny("olmoe"),
    tiny("flex_olmo"),
    tiny("phimoe", **WHOLE),
    tiny("glm4_moe"),
    tiny("dots1", **UNWINDOWED),
    tiny("minimax_m2"),
    tiny("granitemoe", logits_scaling=2.0, attention_multiplier=0.25),
    tiny(
        "granitemoeshared",
        logits_scaling=2.0,
        attention_multiplier=0.25,
        shared_intermediate_size=64,
        gain=1.0,
    ),
    tiny("ernie4_5_moe", moe_k=2, moe_num_experts=4, moe_num_shared_experts=1),
    tiny("hunyuan_v1_moe", moe_topk=2),
    tiny(
        "dbrx",
        d_model=64,
        n_heads=4,
        n_layers=2,
        max_seq_len=512,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    ),
    tiny("jetmoe", num_key_value_heads=2, kv_channels=16),
    tiny("solar_open"),
    tiny("exaone_moe", "window", **WINDOWED, first_k_dense_replace=0),
    tiny("afmoe", "window", **WINDOWED, num_dense_layers=1),
    tiny("mimo_v2_flash", "window, sinks", **WINDOWED),
    tiny(
        "granitemoe_swa", "window, sinks", logits_scaling=2.0, attention_multiplier=0.25, **WINDOWED
    ),
    tiny("cohere2_moe", "window", logit_scale=0.5, **WINDOWED),
    tiny("aria_text", moe_num_experts=4, moe_num_shared_experts=1),
    tiny("laguna", "window", **WINDOWED, num_attention_heads_per_layer=[4, 4]),
    tiny("mellum", "window", **WINDOWED),
    tiny("hy_v3"),
    tiny("flint", "window", **WINDOWED),
    tiny("kolibri1", "window", **WINDOWED),
    tiny(
        "zaya", router_hidden_size=16, num_experts_per_tok=1, targets=("q_proj", "k_proj", "o_proj")
    ),
    # Compressed keys and values.
    tiny("deepseek_v2", num_key_value_heads=4),
    tiny("deepseek_v3", num_key_value_heads=4, quick=True),
    tiny("glm4_moe_lite", num_key_value_heads=4),
    tiny("youtu", num_key_value_heads=4),
    tiny(
        "deepseek_v4",
        num_hidden_layers=2,
        o_groups=2,
        o_lora_rank=16,
        index_n_heads=2,
        index_head_dim=16,
        num_attention_heads=4,
    ),
    tiny("axk1", num_key_value_heads=4),
    tiny(
        "longcat_flash",
        targets=("q_b_proj", "kv_b_proj", "o_proj", "down_proj"),
        num_layers=1,
        ffn_hidden_size=64,
        expert_ffn_hidden_size=32,
        **LONGCAT,
    ),
    tiny("deepseek_v32", index_topk=2048, **INDEXED),
    tiny("deepseek_v32", "sparse", index_topk=12, **INDEXED),
    tiny("glm_moe_dsa", "sparse", index_topk=12, **INDEXED),
    tiny("axk2", "sparse", index_topk=12, gated_norm_rank=8, **INDEXED),
    # Positions as biases.
    tiny("bloom", quick=True),
    tiny("mpt", d_model=64, n_heads=4, n_layers=2, max_seq_len=512, quick=True),
    tiny("falcon", targets=FALCON, quick=True),
    tiny("falcon", "alibi", targets=FALCON, alibi=True),
    tiny("falcon", "new layers", targets=FALCON, new_decoder_architecture=True, num_kv_heads=2),
    tiny("doge"),
    tiny("doge", "keeps 16", keep_window_size=16, quick=True),
    # A state that runs on.
    tiny("mamba", not_for_peft=PEFT, targets=MAMBA, gain=1.0, quick=True),
    tiny(
        "mamba",
        "dt_proj",
        not_for_peft=PEFT,
        targets=("dt_proj",),
        refused="never called as a layer",
        quick=True,
    ),
    tiny("mamba2", not_for_peft=PEFT, num_heads=8, n_groups=1, state_size=8, chunk_size=16),
    tiny("falcon_mamba", not_for_peft=PEFT, targets=MAMBA),
    tiny(
        "jamba",
        targets=(*MAMBA, "q_proj", "o_proj", "down_proj"),
        attn_layer_period=2,
        attn_layer_offset=1,
        quick=True,
    ),
    tiny("bamba", attn_layer_indices=[1]),
    tiny("falcon_h1", not_for_peft=PEFT, quick=True),
    tiny(
        "granitemoehybrid",
        **LINEAR,
        shared_intermediate_size=64,
        logits_scaling=2.0,
        attention_multiplier=0.25,
    ),
    tiny("qwen3_next", **LINEAR, gain=0.8, quick=True),
    tiny("qwen3_5_text", **LINEAR, gain=0.8),
    tiny("qwen3_5_moe_text", **LINEAR, gain=0.8),
    tiny("lfm2", layer_types=["conv", "full_attention"], quick=True),
    tiny("lfm2_moe", layer_types=["conv", "full_attention"], num_dense_layers=1),
    tiny("minimax", layer_types=["linear_attention", "full_attention"], block_size=16),
    tiny("olmo_hybrid", **LINEAR, gain=1.0),
    tiny(
        "recurrent_gemma",
        "window, cap",
        block_types=["recurrent", "attention"],
        attention_window_size=WINDOW,
        logits_soft_cap=5.0,
        quick=True,
    ),
    tiny(
        "nemotron_h",
        not_for_peft=PEFT,
        layers_block_type=["mamba", "attention", "mlp", "moe"],
        num_hidden_layers=4,
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=8,
        chunk_size=16,
        moe_shared_expert_intermediate_size=32,
    ),
    tiny(
        "zamba2",
        layers_block_type=["mamba", "hybrid"],
        n_mamba_heads=8,
        mamba_d_state=8,
        chunk_size=16,
        adapter_rank=8,
        gain=0.7,
    ),
    tiny(
        "zamba",
        layers_block_type=["hybrid", "mamba", "hybrid"],
        num_hidden_layers=3,
        n_mamba_heads=2,
        num_key_value_heads=4,
        mamba_dt_rank=4,
        gain=0.8,
        targets=("in_proj", "out_proj", "linear"),
    ),
    tiny(
        "kimi_linear",
        **LINEAR,
        linear_head_dim=16,
        linear_num_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
    ),
    tiny("bailing_hybrid", **LINEAR, num_key_value_heads=4, short_conv_kernel_size=4),
    tiny("lfm3", "window", layer_types=["conv", "sliding_attention"]),
    tiny("xlstm", num_heads=4, chunk_size=16),
    tiny("rwkv", attention_hidden_size=64, rescale_every=0),
    tiny("rwkv", "rescaled", attention_hidden_size=64, rescale_every=1, refused="its own weights"),
    tiny("qwen4_exp_text", **LINEAR, hc_lowrank=16, **QSA),
    # Of another age.
    tiny("openai-gpt", refused="Conv1D", targets=("c_attn",)),
    tiny("ctrl", dff=128),
    tiny("bert", is_decoder=True),
    tiny("bert", "both ways", refused="tokens that must not be seen", quick=True),
    tiny("roberta", is_decoder=True),
    tiny("xlnet", refused="tokens that must not be seen", d_head=16, d_inner=128),
    tiny(
        "bart",
        targets=("self_attn.q_proj", "self_attn.v_proj", "fc1", "fc2"),
        d_model=64,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=128,
    ),
    # As on the hub, with a part that sees.
    tiny(
        "gemma3",
        "window",
        text=WINDOWED,
        vision={"model_type": "siglip_vision_model"},
        mm_tokens_per_image=1,
        quick=True,
    ),
    tiny(
        "gemma4",
        "cap, shared keys",
        text={
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
            "final_logit_softcapping": 5.0,
        },
        vision={},
    ),
    tiny(
        "mistral3",
        text={"model_type": "mistral", **WHOLE},
        vision={"model_type": "pixtral"},
        image_token_index=VOCABULARY - 1,
        quick=True,
    ),
    tiny(
        "mistral3",
        "ministral3",
        text={"model_type": "ministral3", **MINISTRAL_ROPE},
        vision={"model_type": "pixtral"},
        image_token_index=VOCABULARY - 1,
    ),
    tiny("qwen3_5", text=LINEAR, vision={}, gain=0.8, quick=True),
    tiny("qwen3_5_moe", text=LINEAR, vision={}, gain=0.8),
    tiny("qwen3_vl", text=rope("default", mrope_section=[2, 3, 3]), vision={}),
    tiny(
        "qwen2_5_vl",
        text=rope("default", mrope_section=[2, 3, 3]),
        vision={},
    ),
    tiny(
        "llama4_text", "chunks", attention_chunk_size=WINDOW, intermediate_size_mlp=128, quick=True
    ),
    tiny(
        "llama4",
        "chunks",
        text={"attention_chunk_size": WINDOW, "intermediate_size_mlp": 128},
        vision={},
    ),
)
