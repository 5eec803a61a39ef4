"""A run of the sample tasks that is ready to learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import Prepared


@pytest.fixture(scope="session")
def prepared(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    recipe = {
        "base_model": str(stories_folder),
        "adapter": {"rank": 4},
        "tasks": [{"name": name, "template": f"samples/{name}"} for name in ("animals", "uses")],
        "training": {"max_steps": 6, "row_length": 128, "rows_per_step": 4},
    }
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return prepare(load_recipe(path))
