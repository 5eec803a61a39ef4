"""The kernels that a run's questions need, compiled from before a command loads torch; nothing here does."""

from __future__ import annotations

from contextlib import suppress

from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.models import rehearsal_start
from mtl_lora_cli.recipe.load import LoadedRecipe, load_recipe
from mtl_lora_cli.runs.folder import RunFolder

_MODULE = "mtl_lora_cli.evaluation.rehearsal_process"


def begin(folder: RunFolder) -> None:
    """Begin, where the run's base model lies on this disk and there is something to compile for it.

    Args:
        folder: of a finished run; what is wrong with it is told by whoever opens it.
    """
    with suppress(MtlLoraError):
        _begin(folder, load_recipe(folder.recipe))


def _begin(folder: RunFolder, loaded: LoadedRecipe) -> None:
    recipe = loaded.recipe
    base = rehearsal_start.folder_of(recipe.base_model, loaded.base)
    if base is None or recipe.images is not None:
        return
    kept = rehearsal_start.kept_file(
        base,
        adapter=recipe.adapter.model_dump(mode="json"),
        dtype=recipe.dtype,
        tasks=len(recipe.tasks),
        asked=True,
    )
    rehearsal_start.begin(_MODULE, {"run": str(folder.path.resolve()), "kept": str(kept)}, kept)
