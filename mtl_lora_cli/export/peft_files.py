"""The two files of a standard PEFT LoRA folder: what PEFT and multi-LoRA servers read.

Each task is exactly an ordinary LoRA (`MultiTaskLinear.task_update`), ΔW_t = s B'_t A'_t. The factor s
goes into B, so that PEFT's lora_alpha / r is 1 whatever the method's own scale is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.adapters.layer import MultiTaskLinear
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export.merge import Update
from mtl_lora_cli.export.peft_names import PREFIX, PeftNames

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def write_peft(
    updates: Mapping[str, Update],
    names: PeftNames,
    base_model: str,
    folder: Path,
    lengths: Mapping[str, Tensor] | None = None,
    whole: Mapping[str, Tensor] | None = None,
) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`, float32, into an existing folder.

    Args:
        updates: weight of the model → its update.
        names: what PEFT is told of them.
        base_model: what transformers finds the base model by.
        folder: where to.
        lengths: weight → m [out], where rows get lengths of their own: PEFT's DoRA.
        whole: parameter → what it learned to be: PEFT's `modules_to_save`.
    """
    tensors, ranks = {}, {}
    for weight, (down, up, scale) in updates.items():
        if weight in names.stacks:
            place, transposed = names.stacks[weight]
            below, beside = _stacked(up.mT, down.mT) if transposed else _stacked(down, up)
            tensors[f"{PREFIX}{place}.lora_A.weight"] = below
            tensors[f"{PREFIX}{place}.lora_B.weight"] = scale * beside
            ranks[weight] = down.shape[1]
            continue
        for name in names.of(weight):
            path = name.removesuffix(".weight")
            tensors[f"{PREFIX}{path}.lora_A.weight"] = down.clone()
            tensors[f"{PREFIX}{path}.lora_B.weight"] = scale * up.clone()
            ranks[path] = down.shape[0]
            if lengths:
                tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = lengths[weight].clone()
    for weight, value in (whole or {}).items():
        tensors[f"{PREFIX}{weight}"] = value.detach().float().cpu().clone()
    rank = max(ranks.values())
    others = {path: own for path, own in ranks.items() if own != rank}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": bool(lengths),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": modules_of(whole) if whole else None,
        "target_modules": list(names.targets),
        "exclude_modules": names.excluded,
        **({"target_parameters": list(names.parameters)} if names.parameters else {}),
    }
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def _stacked(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """As PEFT lays out the experts' factors: A_e [E, k, in] → [E k, in], B_e [E, out, k] → [out, k E]."""
    return down.flatten(0, 1).contiguous(), up.permute(1, 2, 0).flatten(1).contiguous()


def ranks_of(updates: Mapping[str, Update]) -> dict[str, int]:
    """k of each weight."""
    return {weight: down.shape[-2] for weight, (down, _, _) in updates.items()}


def targets_of(adapter: Adapter) -> list[str]:
    """The layers' last names where the recipe gave names, as servers want them; else whole paths.

    A name that something above an adapted layer has, too, such as `0`, would lead PEFT to that.
    """
    linear = [path for path, one in adapter.layers.items() if isinstance(one, MultiTaskLinear)]
    names = {path.rpartition(".")[2] for path in linear}
    above = {part for path in adapter.layers for part in path.split(".")[:-1]}
    given = set(adapter.config.target_modules)
    plain = all("*" not in target and "?" not in target for target in given)
    return sorted(names) if plain and names <= given - above else linear


def modules_of(whole: Iterable[str]) -> list[str]:
    """The modules whose parameters these are, by their paths."""
    return sorted({name.rpartition(".")[0] for name in whole})


def saved_modules(model: Any, whole: Iterable[str]) -> list[str]:
    """The same, each learned whole: PEFT saves modules and no part of one.

    Raises:
        UsageError: of a module a parameter alone learned.
    """
    names = set(whole)
    paths = modules_of(names)
    for path in paths:
        for own, _ in model.get_submodule(path).named_parameters(path):
            if own not in names:
                raise UsageError(
                    f"export --format peft: PEFT saves whole modules, and of '{path}' {own} did not learn; "
                    "mtl-lora merge writes it"
                )
    return paths
