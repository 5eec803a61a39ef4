"""All that the memory of a run's steps depends on; no weight is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mtl_lora_cli.engine.decoder import obstacle
from mtl_lora_cli.engine.memory import (
    recompute_of,
    sizes_of,
)
from mtl_lora_cli.engine.sizes import Load, ModelSizes, SightSizes, room_for, with_slack
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.memory.pictures import most_shown, sight_of
from mtl_lora_cli.models.load import on_meta
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.recipe.training import Recompute

if TYPE_CHECKING:
    import torch

    from mtl_lora_cli.adapters.inject import Adapter
    from mtl_lora_cli.data.prepare import TrainingData
    from mtl_lora_cli.models.base import BaseModel

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
        sight: of rows' pictures; None: they show none.
        shown: row length → the most picture tokens that a row has.
    """

    recipe: Recipe
    model: Any
    adapter: Adapter
    device: torch.device
    dtype: torch.dtype
    processes: int
    densest: Callable[[int, str], int]
    longest: int
    sight: SightSizes | None = None
    shown: Callable[[int], int] = lambda length: 0

    def sizes(self) -> ModelSizes:
        """Of model and adapter as the recipe stores them.

        Raises:
            UnknownLayersError: its layers are not the fused engine's.
        """
        recipe, model, adapter = self.recipe, self.model, self.adapter
        reason = "engine: plain" if recipe.engine == "plain" else obstacle(model, adapter)
        if reason is not None:
            raise UnknownLayersError(f"only the fused engine's layers are known, found {reason}")
        found = sizes_of(
            model,
            adapter,
            value=self.dtype.itemsize,
            on_card=self.device.type == "cuda",
            quantization=recipe.quantization,
            base_compute=recipe.base_compute,
            parts=self.processes if recipe.distributed.zero_stage == 3 else 1,
        )
        left = recipe.training.expanded_layers
        return replace(found, sight=self.sight, left_expanded=left if found.expanded else 0)

    def step(self) -> tuple[ModelSizes, Recompute, Load]:
        """What `peak_bytes` wants, for one pass of a step as the recipe says it.

        Raises:
            UsageError: as `sizes`.
        """
        sizes, training = self.sizes(), self.recipe.training
        length = training.row_length
        asked = self.densest(length, training.loss_on)
        row = row_load(length, asked, self.longest, shares=training.share_beginnings)
        row = row._replace(shown=self.shown(length))
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


def situation_of(
    recipe: Recipe,
    base: BaseModel,
    data: TrainingData,
    device: torch.device,
    dtype: torch.dtype,
    processes: int,
) -> Situation:
    """Of a recipe whose tasks are read.

    Args:
        recipe: of the run.
        base: its base model; of its files the configuration alone is read.
        data: encoded tasks.
        device, dtype: where and in what the base model computes.
        processes: of the run.

    Raises:
        UsageError: as `on_meta`.
    """
    model, adapter = on_meta(base, recipe.adapter, [task.name for task in data.tasks])
    sight = sight_of(data, recipe, model, dtype.itemsize)
    return Situation(
        recipe=recipe,
        model=model,
        adapter=adapter,
        device=device,
        dtype=dtype,
        processes=processes,
        densest=lambda length, loss_on: densest(data, length, loss_on),
        longest=longest_of(data),
        sight=sight,
        shown=lambda length: 0 if sight is None else most_shown(data, length),
    )


def row_load(length: int, asked: int, longest: int, *, shares: bool) -> Load:
    """One row: of a shared position several tokens may be asked, and a tree of examples is one segment.

    Args:
        length: positions of the row.
        asked: the most supervised tokens that a row has.
        longest: tokens of the longest example.
        shares: examples share what they begin with.
    """
    if shares:
        return Load(length, asked, length, trees=True)
    return Load(length, min(length, asked), longest)


def together(sizes: ModelSizes, row: Load, count: int) -> Load:
    """So many rows in one pass; captured, it has room for what later epochs may ask."""
    asked = row.asked * count
    if sizes.kernels:
        asked = room_for(with_slack(row.asked, at_most=row.positions) * count)
    positions = row.positions * count
    asked = max(row.asked * count, min(asked, positions))
    return Load(positions, asked, row.longest, row.trees, row.shown * count)


def densest(data: TrainingData, row_length: int, loss_on: str) -> int:
    """The most supervised tokens of a row, in the first epoch's packing."""
    asked = [split.learned_counts(loss_on) for split in data.splits]
    rows = replace(data.mixture, row_length=row_length).first_rows()
    return int(rows.sums(asked).max())


def longest_of(data: TrainingData) -> int:
    """Tokens of the longest example."""
    return max(int(lengths.max()) for lengths in data.mixture.lengths if len(lengths))
