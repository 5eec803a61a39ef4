"""What a step of a recipe takes, and which settings would take less; no weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from mtl_lora_cli.engine.memory import (
    peak_bytes,
    recompute_of,
    sizes_of,
)
from mtl_lora_cli.engine.sizes import Load, ModelSizes
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.load import on_meta
from mtl_lora_cli.recipe.schema import Recipe, Recompute
from mtl_lora_cli.training.passes import ROOM

if TYPE_CHECKING:
    import torch

    from mtl_lora_cli.adapters.inject import Adapter
    from mtl_lora_cli.data.prepare import TrainingData
    from mtl_lora_cli.training.prepare import Prepared

SHORTEST_ROW = 8


class UnknownLayersError(UsageError):
    """The layers are not the fused engine's: how much memory they take is not known."""


@dataclass(frozen=True)
class Situation:
    """Everything that the memory of a run's steps depends on.

    Attributes:
        recipe: of the run.
        model, adapter: on the meta device; see `on_meta`.
        device, dtype: where and in what the base model computes.
        processes: among whom a step's rows are dealt out.
        densest: (row length, `loss_on`) → the most supervised tokens that a row has.
        longest: tokens of the longest example; no row is shorter.
    """

    recipe: Recipe
    model: Any
    adapter: Adapter
    device: torch.device
    dtype: torch.dtype
    processes: int
    densest: Callable[[int, str], int]
    longest: int

    def sizes(self) -> ModelSizes:
        """Of model and adapter as the recipe stores them.

        Raises:
            UnknownLayersError: its layers are not the fused engine's.
        """
        from mtl_lora_cli.engine.decoder import obstacle

        recipe, model, adapter = self.recipe, self.model, self.adapter
        reason = "engine: plain" if recipe.engine == "plain" else obstacle(model, adapter)
        if reason is not None:
            raise UnknownLayersError(f"only the fused engine's layers are known, found {reason}")
        return sizes_of(
            model,
            adapter,
            value=self.dtype.itemsize,
            on_card=self.device.type == "cuda",
            quantization=recipe.quantization,
            base_compute=recipe.base_compute,
            parts=self.processes if recipe.distributed.zero_stage == 3 else 1,
        )

    def step(self) -> tuple[ModelSizes, Recompute, Load]:
        """What `peak_bytes` wants, for one pass of a step as the recipe says it.

        Raises:
            UsageError: as `sizes`.
        """
        sizes, training = self.sizes(), self.recipe.training
        length = training.row_length
        asked = min(length, self.densest(length, training.loss_on))
        row = Load(length, asked, self.longest)
        rows = min(training.rows_per_pass, -(-training.rows_per_step // self.processes))
        recompute = recompute_of(training.gradient_checkpointing, len(sizes.layers))
        return sizes, recompute, together(sizes, row, rows)

    def changed(self, **update: Any) -> Situation:
        """With other keys of the recipe."""
        found = replace(self, recipe=self.recipe.model_copy(update=update))
        if update.get("dtype") == "bfloat16":
            import torch

            found = replace(found, dtype=torch.bfloat16)
        return found


def situation_of(prepared: Prepared) -> Situation:
    """Of a run that is ready to learn."""
    data = prepared.data
    names = [task.name for task in data.tasks]
    model, adapter = on_meta(prepared.base, prepared.recipe.adapter, names)
    return Situation(
        recipe=prepared.recipe,
        model=model,
        adapter=adapter,
        device=prepared.device,
        dtype=prepared.dtype,
        processes=prepared.processes.count,
        densest=lambda length, loss_on: densest(data, length, loss_on),
        longest=longest_of(data),
    )


def together(sizes: ModelSizes, row: Load, count: int) -> Load:
    """So many rows in one pass."""
    asked = row.asked * count
    if sizes.kernels:
        asked = -(-asked // ROOM) * ROOM
    positions = row.positions * count
    return Load(positions, min(asked, positions), row.longest)


def densest(data: TrainingData, row_length: int, loss_on: str) -> int:
    """The most supervised tokens of a row, in the first epoch's packing."""
    import numpy as np

    asked = [
        split.lengths - (1 if loss_on == "all" else np.maximum(1, split.prompt_lengths))
        for split in data.splits
    ]
    rows = replace(data.mixture, row_length=row_length).epoch(0)
    return max(sum(int(asked[task][number]) for task, number in row) for row in rows)


def longest_of(data: TrainingData) -> int:
    """Tokens of the longest example."""
    return max(int(lengths.max()) for lengths in data.mixture.lengths if len(lengths))


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
