"""With which recipe a run goes on: one of before may say an objective that is the template's today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.going_on import with_free


def recipe(objective: str | None, **training: Any) -> Recipe:
    task = {"name": "a", "template": "glue/rte", "objective": objective}
    return Recipe.model_validate({"tasks": [task], "training": training})


def test_the_templates_objective_is_no_change() -> None:
    run = RunFolder(Path("runs/old"))
    own = recipe("causal_lm", checkpoint_every=5)
    found = with_free(own, recipe(None, checkpoint_every=7), run)
    assert found.tasks == own.tasks
    assert found.training.checkpoint_every == 7
    for other in (recipe("conversation"), recipe(None, learning_rate=1.0)):
        with pytest.raises(UsageError, match="the recipe differs from that of run 'old'"):
            with_free(own, other, run)
