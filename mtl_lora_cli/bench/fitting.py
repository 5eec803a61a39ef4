"""What a recipe's `training.memory: auto` picks for a case: training's own arithmetic, on the
yardstick's examples."""

from __future__ import annotations

from dataclasses import replace

import torch

from mtl_lora_cli.adapters.methods.base import Settings
from mtl_lora_cli.bench.cases import Case
from mtl_lora_cli.bench.random_model import empty_model
from mtl_lora_cli.bench.shapes import find_config
from mtl_lora_cli.bench.yardstick import densest, lengths
from mtl_lora_cli.engine.memory import GIB
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.machine.cards import free_memory
from mtl_lora_cli.memory.choice import pick, there
from mtl_lora_cli.memory.situation import Situation
from mtl_lora_cli.models.load import adapt
from mtl_lora_cli.recipe.schema import Recipe, TaskSettings
from mtl_lora_cli.recipe.training import Training


def fitted(
    case: Case, config: Settings, device: torch.device, dtype: torch.dtype
) -> tuple[Case, str | None]:
    """The case with the rows and the recomputation that training would pick here.

    Args:
        case: what is to be measured; nothing of it is in memory yet.
        config: of its adapter.
        device, dtype: where and in what the base model computes.

    Returns:
        The case, and the line that says what was picked; None where nothing was to be picked.

    Raises:
        UsageError: the layers are not the fused engine's, or nothing fits.
    """
    if case.memory == "manual":
        return case, None
    free, name = free_memory(device)
    found = pick(_situation(case, config, device, dtype), free)
    if isinstance(found, int):
        free_there = there(free, case.memory_limit, name)
        raise UsageError(
            f"training.memory: auto: {free_there}, and the least that is "
            f"needed is {found / GIB:.1f} GiB, with everything computed again"
        )
    message = found.message(name, case.row_length, case.rows_per_step)
    return replace(case, **found.settings()), message


def _situation(case: Case, config: Settings, device: torch.device, dtype: torch.dtype) -> Situation:
    names = [f"task{number}" for number in range(case.tasks)]
    model = empty_model(find_config(case.shape), dtype=dtype)
    with torch.device("meta"):
        adapter = adapt(model, config, names)
    recipe = Recipe(
        quantization="nf4" if case.quantization == "nf4" else "none",
        # The plain baseline goes over the same rows as the case that it stands beside.
        engine="auto" if case.baseline == "plain" else case.engine,
        base_compute="fp8" if case.base_compute == "fp8" else "dtype",
        tasks=[TaskSettings(name=names[0], template="")],
        training=Training(
            row_length=case.row_length,
            rows_per_step=case.rows_per_step,
            memory="auto",
            memory_limit=case.memory_limit,
        ),
    )
    return Situation(
        recipe=recipe,
        model=model,
        adapter=adapter,
        device=device,
        dtype=dtype,
        processes=1,
        densest=lambda row_length, _: densest(row_length),
        longest=max(one.tokens for one in lengths()),
    )
