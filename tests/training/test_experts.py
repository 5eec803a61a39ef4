"""A whole run with adapters on experts: killed and resumed to the last bit, and merged for transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from mtl_lora_cli.adapters.files import read_tensors
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.runs.folder import find_run
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.run import resume, start

from ..families.build import build
from ..families.models import MODELS

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    ("kind", "experts", "quantization"),
    [
        ("qwen2_moe", "each", "none"),
        ("gpt_oss-window-sinks", "shared", "nf4"),
    ],
)
def test_a_run_is_resumed_to_the_last_bit(
    tmp_path: Path, kind: str, experts: str, quantization: str
) -> None:
    (model,) = (one for one in MODELS if str(one) == kind)
    content = {
        "base_model": str(build(model, tmp_path / "base")),
        "quantization": quantization,
        "adapter": {"rank": 2, "dropout": 0.1, "experts": experts, "target_modules": ["q_proj"]},
        "tasks": [{"name": name, "template": f"samples/{name}"} for name in ("animals", "uses")],
        "training": {
            "max_steps": 4,
            "epochs": 9,
            "row_length": 128,
            "rows_per_step": 1,
            "checkpoint_every": 2,
        },
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    run = start(prepare(load_recipe(recipe)), tmp_path / "runs" / "one")
    finished = read_tensors(run.require_adapter())
    assert any("experts.down_proj.lora_A" in name for name in finished)
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "step-000004")
    resume(find_run(None, tmp_path / "runs"), None, [])
    again = read_tensors(run.require_adapter())
    assert all(torch.equal(finished[name], again[name]) for name in finished)
