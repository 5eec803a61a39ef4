"""The process that compiles a run's kernels while the command loads libraries, reads rows and encodes them.

python -m mtl_lora_cli.training.rehearsal_process
{"recipe": "recipe.yaml", "overrides": []}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtl_lora_cli.models.rehearsal_process import answer


def _compile(request: Any) -> None:
    from mtl_lora_cli.machine.cards import pick_device, pick_dtype
    from mtl_lora_cli.models.base import find_base_model
    from mtl_lora_cli.recipe.load import load_recipe
    from mtl_lora_cli.training.rehearsed import compile_kernels

    loaded = load_recipe(Path(request["recipe"]), request["overrides"])
    recipe, device = loaded.recipe, pick_device()
    base = find_base_model(recipe.base_model, beside=loaded.base)
    names = [task.name for task in recipe.tasks]
    compile_kernels(recipe, base, names, pick_dtype(recipe.dtype, device), device)


if __name__ == "__main__":
    answer(_compile)
