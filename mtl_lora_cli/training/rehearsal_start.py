"""A run's kernels compiled by a process of its own, from before the command loads torch; nothing here does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtl_lora_cli.models import rehearsal_start
from mtl_lora_cli.recipe.load import LoadedRecipe
from mtl_lora_cli.recipe.schema import Recipe

_MODULE = "mtl_lora_cli.training.rehearsal_process"


def begin(loaded: LoadedRecipe, overrides: Sequence[str]) -> None:
    """Begin, where the base model lies on this disk and there is something to compile for it.

    Args:
        loaded: the run's recipe.
        overrides: of the command line.
    """
    recipe = loaded.recipe
    folder = rehearsal_start.folder_of(recipe.base_model, loaded.base)
    if folder is not None and compiles(recipe):
        request = {"recipe": str(loaded.path.resolve()), "overrides": list(overrides)}
        rehearsal_start.begin(_MODULE, request, kept_file(recipe, folder))


def compiles(recipe: Recipe) -> bool:
    """Whether kernels are compiled ahead: of runs of texts, whose weights are not cut into parts."""
    return recipe.images is None and recipe.distributed.zero_stage != 3


def kept_file(recipe: Recipe, folder: Path) -> Path:
    """The file that is there once a recipe's kernels are compiled.

    Args:
        recipe: the run's.
        folder: of its base model.
    """
    training = recipe.training
    return rehearsal_start.kept_file(
        folder,
        adapter=recipe.adapter.model_dump(mode="json"),
        dtype=recipe.dtype,
        tasks=len(recipe.tasks),
        row_length=training.row_length,
        rows=training.rows_per_pass,
        share=training.share_beginnings,
    )
