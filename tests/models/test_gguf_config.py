"""A GGUF file says more of its model than transformers reads: it is taken over, or the file is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export.gguf_model import write_model
from mtl_lora_cli.models.gguf import converted_folder
from mtl_lora_cli.models.gguf_config import require_all_read

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN = {**LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 128}
Make = Callable[..., Path]


@pytest.fixture
def model(stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A small random model of a type, with the tokenizer of the tiny one."""
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))

    def make(kind: str = "llama", **keys: Any) -> Path:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "vocab_size": json.loads((stories_folder / "config.json").read_text())["vocab_size"],
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
        }
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | keys))
        for parameter in made.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.data.add_(1.5 * spread * torch.randn_like(parameter))
        folder = tmp_path / "model"
        made.save_pretrained(folder)
        AutoTokenizer.from_pretrained(stories_folder).save_pretrained(folder)
        return folder

    return make


def written(folder: Path) -> Path:
    path = folder.parent / "model.gguf"
    write_model(folder, path, title="made", tokenizer=AutoTokenizer.from_pretrained(folder))
    return path


def edited(
    path: Path,
    keys: dict[str, Any],
    tensors: dict[str, np.ndarray] | None = None,
    without: str = "",
) -> Path:
    """The file with other keys and tensors: None leaves a key out, `without` tensors of whose name it is a part."""
    reader = gguf.GGUFReader(path)
    new = path.with_name("edited.gguf")
    writer = gguf.GGUFWriter(new, reader.fields["general.architecture"].contents())
    skipped = ("GGUF.", "general.architecture")
    fields = {n: f for n, f in reader.fields.items() if not n.startswith(skipped)}
    for name, field in fields.items():
        if name not in keys:
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for name, value in keys.items():
        if value is not None:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    kept = {one.name: one.data for one in reader.tensors if not (without and without in one.name)}
    for name, data in {**kept, **(tensors or {})}.items():
        writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return new


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(3, 123)[None]
    with torch.no_grad():
        out: torch.Tensor = model(ids).logits.log_softmax(-1)
    return out


@pytest.mark.parametrize(
    ("kind", "config", "keys"),
    [
        ("llama", {}, {}),
        ("llama", {"rope_parameters": LLAMA3}, {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
        (
            "llama",
            {"rope_parameters": LINEAR},
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        ),
        ("llama", {"rope_parameters": LINEAR}, {"llama.rope.scaling.factor": 4.0}),
        (
            "llama",
            {"rope_parameters": YARN},
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 128,
            },
        ),
        ("llama", {}, {"llama.rope.freq_base": None}),  # 10,000, as llama.cpp has it
        ("qwen3", {"sliding_window": None}, {"tokenizer.ggml.pre": "default"}),
    ],
    ids=["plain", "llama3", "biases", "linear", "unnamed", "yarn", "no base", "head_dim"],
)
def test_what_the_file_says_is_what_the_folder_computes(
    model: Make, kind: str, config: dict[str, Any], keys: dict[str, Any]
) -> None:
    folder = model(kind, **config)
    right = logits(folder)
    scaling = any("scaling" in key for key in keys)
    if scaling:  # which our own writer refuses
        content = json.loads((folder / "config.json").read_text())
        content["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
        (folder / "config.json").write_text(json.dumps(content))
    path = written(folder)
    found = logits(converted_folder(edited(path, keys) if keys else path))
    assert (found - right).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("keys", "without", "said"),
    [
        ({"llama.expert_count": 4}, "", r"its key 'expert_count' \(4\) is not known here"),
        ({"llama.logit_scale": 0.5}, "", r"its key 'logit_scale' \(0.5\) is not known here"),
        ({"llama.attention.sliding_window": 16}, "", "its key 'attention.sliding_window' .16."),
        (
            {"llama.rope.scaling.type": "longrope"},
            "",
            "rotary positions of type 'longrope' .* are not known here",
        ),
        ({"llama.rope.dimension_count": 4}, "", r"its key 'rope.dimension_count' \(4 of 8\)"),
        ({}, "blk.1.ffn_up", "1 weights are not in it, the first is .*layers.1.mlp.up_proj"),
        ({"split.count": 2}, "", "it is one of 2 parts; .*llama-gguf-split --merge"),
    ],
    ids=["experts", "scale", "window", "longrope", "part", "missing", "split"],
)
def test_what_is_not_taken_over_is_refused(
    model: Make, keys: dict[str, Any], without: str, said: str
) -> None:
    path = edited(written(model()), keys, without=without)
    with pytest.raises(UsageError, match=f"edited.gguf: cannot be converted: {said}"):
        converted_folder(path)


def test_an_output_layer_that_copies_the_embedding_is_none_of_its_own(model: Make) -> None:
    """As a converter writes it for families whose output layer is always the embedding."""
    folder = model(tie_word_embeddings=True)
    tied = AutoModelForCausalLM.from_pretrained(folder)
    nothing: dict[str, Any] = {"missing_keys": (), "mismatched_keys": ()}
    path = written(folder)
    (embedding,) = (one for one in gguf.GGUFReader(path).tensors if one.name == "token_embd.weight")
    copied = edited(path, {}, {"output.weight": embedding.data})
    require_all_read(gguf.GGUFReader(copied), tied, nothing)
    other = edited(path, {}, {"output.weight": 2 * embedding.data})
    with pytest.raises(UsageError, match=r"its tensors have [\d,]+ values"):
        require_all_read(gguf.GGUFReader(other), tied, nothing)


def test_a_tensor_that_nobody_reads_is_refused(model: Make) -> None:
    path = edited(written(model()), {}, {"blk.0.attn_q.bias": np.ones(32, dtype=np.float32)})
    with pytest.raises(UsageError, match=r"its tensors have [\d,]+ values, and .*'llama' has"):
        converted_folder(path)


def test_other_frequencies_than_llama3s_are_refused(model: Make) -> None:
    factors = np.array([1, 3, 1, 2], dtype=np.float32)
    path = edited(written(model()), {}, {"rope_freqs.weight": factors})
    with pytest.raises(UsageError, match=r"'rope_freqs\.weight' is no scaling of positions"):
        converted_folder(path)
