"""The two files of a standard PEFT LoRA folder: what PEFT and multi-LoRA servers read.

Each task is exactly an ordinary LoRA (`MultiTaskLinear.task_update`), ΔW_t = s B'_t A'_t. The factor s
goes into B, so that PEFT's lora_alpha / r is 1 whatever the method's own scale is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.torch import save_file

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.export.merge import Update
from mtl_lora_cli.export.peft_names import PREFIX

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def write_peft(
    updates: Mapping[str, Update],
    targets: list[str],
    base_model: str,
    folder: Path,
    *,
    wrapped: Mapping[str, str] = MappingProxyType({}),
    excluded: str | None = None,
) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`, float32, into an existing folder.

    Args:
        updates: weight of the model → its update.
        targets: names of the adapted layers.
        base_model: what transformers finds the base model by.
        folder: where to.
        wrapped: weight → its name in the wrapper, see `wrapper_names`. PEFT takes the names that it finds in
            the model that it is given, so both are written.
        excluded: expression of modules with a target's name that are not adapted.
    """
    tensors, ranks = {}, {}
    for weight, (down, up, scale) in updates.items():
        for name in dict.fromkeys((weight, wrapped.get(weight, weight))):
            path = name.removesuffix(".weight")
            tensors[f"{PREFIX}{path}.lora_A.weight"] = down.clone()
            tensors[f"{PREFIX}{path}.lora_B.weight"] = scale * up.clone()
            ranks[path] = down.shape[0]
    if any("." in target for target in targets):
        targets = list(ranks)
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
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": targets,
        "exclude_modules": excluded,
    }
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def targets_of(adapter: Adapter) -> list[str]:
    """The layers' last names where the recipe gave names, as servers want them; else whole paths.

    A name that something above an adapted layer has, too, such as `0`, would lead PEFT to that.
    """
    names = {path.rpartition(".")[2] for path in adapter.layers}
    above = {part for path in adapter.layers for part in path.split(".")[:-1]}
    given = set(adapter.config.target_modules)
    plain = all("*" not in target and "?" not in target for target in given)
    return sorted(names) if plain and names <= given - above else [*adapter.layers]
