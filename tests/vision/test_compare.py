"""Methods are compared on tasks that show pictures, too: ranks are matched on the language part's layers."""

from __future__ import annotations

from pathlib import Path

import yaml

from mtl_lora_cli.compare.study import StudyOptions, plan_study
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.load import load_config
from mtl_lora_cli.recipe.load import load_recipe

from ..sights import COLOUR


def test_ranks_of_a_model_that_sees_are_matched(
    llava: BaseModel, squares: Path, tmp_path: Path
) -> None:
    (tmp_path / "colour.yaml").write_text(yaml.safe_dump(COLOUR))
    adapter = {"method": "mtl-lora", "rank": 4, "up_projections": 1, "transform": "diagonal"}
    recipe = {
        "base_model": str(llava.folder),
        "adapter": {**adapter, "whole_modules": ["multi_modal_projector"]},
        "tasks": [{"name": "colour", "template": "colour.yaml", "source": str(squares)}],
        "training": {"parts": {"transform": {"learning_rate": 0.01}}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = StudyOptions(["lora", "mtl-lora"], "params", [0], {}, "lora")
    plan = plan_study(load_recipe(tmp_path / "recipe.yaml", []), tmp_path / "out", options)
    text = load_config(llava).get_text_config()
    width, layers = text.hidden_size, text.num_hidden_layers
    heads = text.num_key_value_heads / text.num_attention_heads
    sides = 2 * width + 2 * width * (1 + heads) + 2 * width  # of q, of k and v, of o
    counts = {run.method: run.parameters for run in plan.runs}
    assert counts["lora"] == layers * 4 * sides
    assert abs(counts["lora"] / counts["mtl-lora"] - 1) < 0.02
