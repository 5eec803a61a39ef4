"""VQAv2, GQA, NLVR2 and COCO captions in their own files, in miniature: one run learns all four, and is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mtl_lora_cli.evaluation.evaluate import evaluate
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.run import start

from ..questions import LAYOUTS, write_layout

METRICS = {
    "vqa-v2": ["vqa_accuracy", "exact_match"],
    "gqa": ["gqa_accuracy", "exact_match"],
    "nlvr2": ["accuracy", "f1"],
    "coco-captions": ["cider", "bleu", "rouge_l"],
}


@pytest.mark.slow
def test_each_layout_trains_and_is_evaluated(
    llava: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    for layout in LAYOUTS:
        write_layout(tmp_path / layout, layout)
    recipe = {
        "base_model": str(llava.folder),
        "adapter": {"rank": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "tasks": [
            {"name": layout, "template": name, "source": {"path": layout, "layout": layout}}
            for layout, name in LAYOUTS.items()
        ],
        "training": {"max_steps": 3, "rows_per_step": 4, "row_length": 256},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = Run(start(prepare(load_recipe(tmp_path / "recipe.yaml")), tmp_path / "one"))
    for result in evaluate(run, run.tasks, Setting()):
        assert list(result["metrics"]) == METRICS[result["task"]]
        for value in result["metrics"].values():
            assert value["low"] <= value["value"] <= value["high"]
