"""Which engine a recipe's model would run on, tried before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mtl_lora_cli.adapters.methods.base import Settings
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.machine.cards import free_memory
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.load import adapt, load_config, load_model
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.stand_in import NoStandIn, stand_in
from mtl_lora_cli.models.trust import settle
from mtl_lora_cli.models.trusted import settled
from mtl_lora_cli.recipe.schema import Recipe

_SHARE = 0.4  # of free memory that a trial may take
_LARGEST = {"cpu": 4 * 2**30, "cuda": 64 * 2**30}  # bytes of weights; more takes too long to read


def tried(
    recipe: Recipe,
    base: BaseModel,
    config: Settings,
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The engine, and the self-test's result, as `PackedModel.engine_report` gives them.

    Where the weights are not here, or too large to be read for a trial, a small model of the same kind
    stands for them: few layers, random weights.

    Raises:
        UsageError: the model is refused.
    """
    stored = sum(path.stat().st_size for path in base.folder.glob("*.safetensors"))
    if 0 < stored <= min(_LARGEST[device.type], _SHARE * free_memory(device)[0]):
        model = load_model(base, dtype=dtype, device=device, quantization=recipe.quantization)
        adapter = adapt(model, config, names)
        packed = PackedModel(
            model, adapter, engine=recipe.engine, base_compute=recipe.base_compute
        ).eval()
        settled(packed, base, quantization=recipe.quantization, base_compute=recipe.base_compute)
        return packed.engine_report()
    try:
        small = stand_in(load_config(base), device, dtype)
    except NoStandIn:
        return {"engine": None, "why": "its weights are not read here: tried when the run begins"}
    try:
        packed = PackedModel(small.model, engine=recipe.engine).eval()
        packed.trust = settle(packed)
    except UsageError as error:
        raise UsageError(f"{error} (tried on a small model of the same kind)") from error
    return {**packed.engine_report(), "tried_on": "a small model of the same kind"}


def in_a_line(report: dict[str, Any]) -> str:
    """A report as `validate` and `doctor` show it."""
    if report["engine"] is None:
        return f"engine: {report['why']}"
    small = f" (tried on {report['tried_on']})" if "tried_on" in report else ""
    test = report.get("self_test")
    return f"{report['line']}" + (f"; {test}{small}" if test is not None else small)
