"""What a base model's folder holds and its configuration does not: told, since the run computes without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import adapt, load_model


def remarks(folder: Path) -> list[str]:
    model = load_model(
        find_base_model(str(folder)), dtype=torch.float32, device=torch.device("cpu")
    )
    return adapt(model, configure(target_modules=("q_proj",)), ("one",)).remarks


@pytest.fixture
def copied(stories_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stories_folder, tmp_path / "base"))


def add(folder: Path, name: str, size: int) -> None:
    tensors = {**load_file(folder / "model.safetensors"), name: torch.ones(size)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change(folder: Path, **keys: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **keys}))


def test_a_whole_model_has_no_remark(copied: Path) -> None:
    # A buffer that older files hold, and transformers leaves out by rule.
    add(copied, "model.layers.0.self_attn.rotary_emb.inv_freq", 4)
    assert remarks(copied) == []


def test_tensors_that_are_no_weight_are_named(copied: Path) -> None:
    add(copied, "model.layers.1.self_attn.q_proj.bias", 64)
    (line,) = remarks(copied)
    assert "1 of its files' tensors is no weight of LlamaForCausalLM" in line
    assert "left out: model.layers.1.self_attn.q_proj.bias" in line


def test_layers_beyond_the_configurations_are_counted(copied: Path) -> None:
    layers = json.loads((copied / "config.json").read_text())["num_hidden_layers"]
    names = [name for name in load_file(copied / "model.safetensors") if ".layers.0." in name]
    change(copied, num_hidden_layers=layers - 2)
    (line,) = remarks(copied)
    assert f"{2 * len(names)} of its files' tensors are no weight" in line


def test_code_that_is_not_run_is_named(copied: Path) -> None:
    change(copied, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    (copied / "modeling_own.py").write_text("raise SystemExit\n")
    (line,) = remarks(copied)
    assert "(modeling_own.Own), which is never run: transformers' LlamaForCausalLM" in line
