"""Which settings of a recipe would take less memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from mtl_lora_cli.engine.memory import peak_bytes
from mtl_lora_cli.memory.situation import SHORTEST_ROW, Situation
from mtl_lora_cli.recipe.schema import Recipe

if TYPE_CHECKING:
    import torch


class Remedy(NamedTuple):
    """A setting, the bytes that it saves, and the situation with it."""

    saves: int
    text: str
    situation: Situation


def remedies(situation: Situation) -> list[Remedy]:
    """Settings that save more than a hundredth, the most helpful first.

    Raises:
        UnknownLayersError: as `Situation.sizes`.
    """
    peak = peak_bytes(*situation.step())
    found = [
        Remedy(peak - peak_bytes(*other.step()), text, other)
        for text, other in alternatives(situation)
    ]
    helpful = [one for one in found if one.saves > 0.01 * peak]
    return sorted(helpful, key=lambda one: one[:2], reverse=True)


def alternatives(situation: Situation) -> Iterator[tuple[str, Situation]]:
    """Recipes that take less, each with the setting that makes the difference."""
    recipe = situation.recipe
    training = recipe.training

    def with_training(**update: Any) -> Situation:
        return situation.changed(training=training.model_copy(update=update))

    if training.gradient_checkpointing is not True:
        yield (
            "training.gradient_checkpointing: true",
            with_training(gradient_checkpointing=True),
        )
    if training.expanded_layers:
        yield "training.expanded_layers: 0", with_training(expanded_layers=0)
    if training.rows_per_pass > 1:
        half = training.rows_per_pass // 2
        yield f"training.rows_per_pass: {half}", with_training(rows_per_pass=half)
    half = training.row_length // 2
    if half >= max(situation.longest, SHORTEST_ROW):
        yield f"training.row_length: {half}", with_training(row_length=half)
    if training.loss_on == "all":
        yield "training.loss_on: answer", with_training(loss_on="answer")
    if recipe.quantization == "none":
        yield "quantization: nf4", situation.changed(quantization="nf4")
    if situation.dtype.itemsize > 2:
        yield "dtype: bfloat16", situation.changed(dtype="bfloat16")
    # What stage 3 does not go with: see the recipe's schema.
    apart = recipe.quantization == "int8" or recipe.base_compute == "fp8" or training.diagnose
    if recipe.distributed.zero_stage < 3 and situation.processes > 1 and not apart:
        cut = recipe.distributed.model_copy(update={"zero_stage": 3})
        yield "distributed.zero_stage: 3", situation.changed(distributed=cut)


def settings_that_help(recipe: Recipe, dtype: torch.dtype) -> list[str]:
    """The same without arithmetic, for layers whose sizes are not known; the most helpful first."""
    found = []
    if recipe.quantization == "none":
        found.append("quantization: nf4")
    if dtype.itemsize > 2:
        found.append("dtype: bfloat16")
    found.append("a smaller training.row_length with on_overflow: truncate_prompt")
    if recipe.training.loss_on == "all":
        found.append("training.loss_on: answer")
    found.append("fewer adapter.target_modules")
    found.append("a smaller base_model")
    return found
