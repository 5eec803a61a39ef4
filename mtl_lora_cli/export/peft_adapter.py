"""One task of a run as a standard PEFT LoRA folder: what PEFT and multi-LoRA servers read.

Each task is exactly an ordinary LoRA (`MultiTaskLinear.task_update`), ΔW_t = s B'_t A'_t. The factor s
goes into B, so that PEFT's lora_alpha / r is 1 whatever the method's own scale is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.torch import save_file

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.export.card import model_card
from mtl_lora_cli.export.check import Answers, Check, Comparison, Questions, Reader, run_itself
from mtl_lora_cli.export.low_rank import Exported, Truncation, ask_at, updates_at
from mtl_lora_cli.export.merge import Update
from mtl_lora_cli.export.peft_names import PREFIX, beside_the_text, require_named
from mtl_lora_cli.export.run_merge import require_held_out, write_checked
from mtl_lora_cli.export.weight_names import wrapper_class, wrapper_names
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.load import load_config, model_class
from mtl_lora_cli.tasks.task import Task

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_USE = """\
```python
from peft import PeftModel
from transformers import {kind}

base = {kind}.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```

With vLLM, beside other tasks on the same base model:

```sh
vllm serve {base} --enable-lora --max-lora-rank {room} --lora-modules {task}=THIS_FOLDER
```
"""
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


def export_peft(
    run: Run,
    task: Task,
    folder: Path,
    *,
    rank: int | None = None,
    limit: int = 32,
    tolerance: float | None = None,
    checked: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write one task's LoRA, load it with PEFT itself, compare, and only then put it in its place.

    Args:
        run: the run; the comparison is on its own base weights, quantised ones included.
        task: which one.
        folder: where to; must not exist or be empty.
        rank: a lower rank than the update's own, see `low_rank`.
        limit, tolerance: see `Check`.
        checked: compare at all.
        say: called with progress lines.

    Raises:
        UsageError: the output folder is not empty, PEFT is not installed or cannot name the layers, the
            rank is too large, or the method is no LoRA for any task.
        CheckError: what PEFT makes of it differs; it lies aside.
    """
    updates, truncation = updates_at(run, task, rank)
    wrapped = wrapper_names(run.base, updates)
    if checked:
        _require_peft()
        require_held_out(task, limit)
    targets = _targets(run.adapter)

    def write(path: Path) -> None:
        excluded = beside_the_text(run.base, updates, wrapped, targets)
        write_peft(updates, targets, _loadable(run.base), path, wrapped=wrapped, excluded=excluded)
        require_named(run.base, path)

    written = write_checked(
        run,
        task,
        folder,
        what="the exported adapter differs from the run's",
        size=(1 + bool(wrapped))
        * sum(4 * (down.numel() + up.numel()) for down, up, _ in updates.values()),
        write=write,
        check=Check(loaded_by_peft, _models(rank), limit, tolerance) if checked else None,
        readme=partial(_card, run, task, truncation=truncation),
        say=say,
    )
    return Exported(**vars(written), truncation=truncation)


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
    save_file(tensors, folder / _TENSORS, metadata={"format": "pt"})
    text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    (folder / _CONFIG).write_text(text, encoding="utf-8")


def loaded_by_peft(questions: Questions, folder: Path) -> Answers:
    """The run's own base model with the written adapter, as PEFT puts them together."""
    from peft import PeftModel

    run = questions.run
    model = questions.load_alone(run.base.folder, run.recipe.quantization)
    return questions.ask_alone(PeftModel.from_pretrained(model, str(folder)).eval())


def run_at_written_rank(questions: Questions, folder: Path) -> Answers:
    """The run at the rank of the written adapter, on its own base weights."""
    return ask_at(questions, _rank(folder), questions.run.recipe.quantization)


def _models(rank: int | None) -> dict[str, Reader]:
    """What PEFT's answers are compared with; what they must equal stands first."""
    reduced: dict[str, Reader] = {}
    if rank is not None:
        reduced[f"the run's update at rank {rank}"] = run_at_written_rank
    return {**reduced, "the run's adapter": run_itself}


def _loadable(base: BaseModel) -> str:
    """What transformers finds the base model by: a hub id, or the folder on this disk."""
    return base.name if base.revision is not None else str(base.folder)


def _loaded_as(base: BaseModel) -> str:
    """The class of transformers that loads it."""
    return str(model_class(base, load_config(base)).__name__)


def _rank(folder: Path) -> int:
    return int(json.loads((folder / _CONFIG).read_text(encoding="utf-8"))["r"])


def _targets(adapter: Adapter) -> list[str]:
    """The layers' last names where the recipe gave names, as servers want them; else whole paths.

    A name that something above an adapted layer has, too, such as `0`, would lead PEFT to that.
    """
    names = {path.rpartition(".")[2] for path in adapter.layers}
    above = {part for path in adapter.layers for part in path.split(".")[:-1]}
    given = set(adapter.config.target_modules)
    plain = all("*" not in target and "?" not in target for target in given)
    return sorted(names) if plain and names <= given - above else [*adapter.layers]


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UsageError(
            "export --format peft checks what it wrote with PEFT, which is not installed; get it "
            "with: pip install peft, or write without comparing: --no-check"
        ) from None


def _card(
    run: Run,
    task: Task,
    folder: Path,
    comparison: Comparison | None,
    *,
    truncation: Truncation | None,
) -> str:
    reduced = "" if truncation is None else f"\n\nThe rank was reduced: {truncation}."
    wrapped = wrapper_class(run.base)
    twice = (
        f" Its tensors stand there twice, as {_loaded_as(run.base)} names them and as "
        f"{wrapped.__name__} does."
        if wrapped is not None
        else ""
    )
    base = run.base.name if run.base.revision is not None else "BASE_MODEL"
    room = next((room for room in _VLLM_RANKS if room >= _rank(folder)), _rank(folder))
    return model_card(
        run,
        task,
        comparison,
        title=f"A LoRA for {task.name} on {Path(run.base.name).name}",
        library="peft",
        relation="adapter",
        about=f"One task of the run `{run.folder.name}`: of its method, {run.recipe.adapter.method}, "
        "one task is exactly an ordinary LoRA. lora_alpha / r is 1; the method's own scale is in B."
        f"{twice}{reduced}",
        use=_USE.format(kind=_loaded_as(run.base), base=base, room=room, task=task.name),
    )
