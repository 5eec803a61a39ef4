"""One task of a run as a standard PEFT LoRA folder: what PEFT and multi-LoRA servers read.

Each task is exactly an ordinary LoRA (`MultiTaskLinear.task_update`), ΔW_t = s B'_t A'_t. The factor s
goes into B, so that PEFT's lora_alpha / r is 1 whatever the method's own scale is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.open_run import OpenRun
from mtl_lora_cli.export.check import Comparison, compare
from mtl_lora_cli.export.merge import require_empty, task_updates
from mtl_lora_cli.export.run_merge import Merged, write_checked
from mtl_lora_cli.models.load import load_model
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.tasks.task import Task

_PREFIX = "base_model.model."  # PEFT's name for what it wraps


def export_peft(
    opened: OpenRun,
    task: Task,
    folder: Path,
    *,
    limit: int,
    tolerance: float | None,
    say: Callable[[str], None],
) -> Merged:
    """Write one task's LoRA, load it with PEFT itself, compare, and only then put it in its place.

    Args:
        opened: the run; the comparison is on its own base weights, 4-bit ones included.
        task: which one.
        folder: where to; must not exist or be empty.
        limit: examples to compare on.
        tolerance: largest difference of log-probabilities allowed; default: by dtype.
        say: called with progress lines.

    Raises:
        UsageError: the output folder is not empty, PEFT is not installed, or the method is no LoRA
            for any task.
        CheckError: what PEFT makes of it differs; nothing is left in `folder`.
    """
    require_empty(folder)
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UsageError(
            "export --format peft checks what it wrote with PEFT, which is not installed; "
            "get it with: pip install peft"
        ) from None

    def check(written: Path) -> Comparison:
        say("loading it with PEFT and comparing")
        return compare(opened, task, _loaded(opened, written), limit, tolerance)

    return write_checked(
        task,
        folder,
        what="the exported adapter differs from the run's",
        write=lambda path: write_peft(opened.adapter, task.id, opened.base.name, path),
        check=check,
        readme=lambda comparison: _readme(opened, task, comparison),
    )


def write_peft(adapter: Adapter, task: int, base_model: str, folder: Path) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`, float32, into an existing folder."""
    tensors, ranks = {}, {}
    for name, (down, up, scale) in task_updates(adapter, task).items():
        path = name.removesuffix(".weight")
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = down.contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = (scale * up).contiguous()
        ranks[path] = down.shape[0]
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
        "target_modules": _targets(adapter),
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def _targets(adapter: Adapter) -> list[str]:
    """The layers' last names where the recipe gave names, as servers want them; else whole paths."""
    names = sorted({path.rpartition(".")[2] for path in adapter.layers})
    plain = all("*" not in t and "?" not in t for t in adapter.config.target_modules)
    return (
        names if plain and set(names) <= set(adapter.config.target_modules) else [*adapter.layers]
    )


def _loaded(opened: OpenRun, folder: Path) -> PackedModel:
    """The base model with the written adapter, as PEFT puts them together."""
    from peft import PeftModel

    model = load_model(
        opened.base,
        dtype=opened.dtype,
        device=opened.device,
        quantization=opened.recipe.quantization,
    )
    wrapped = PeftModel.from_pretrained(model, str(folder))
    return PackedModel(wrapped.get_base_model(), engine="plain").eval()


def _readme(opened: OpenRun, task: Task, comparison: Comparison) -> str:
    recipe, base = opened.recipe, opened.base
    return (
        "---\n"
        "library_name: peft\n"
        f"base_model: {base.name}\n"
        "pipeline_tag: text-generation\n"
        "---\n"
        f"# A LoRA for the task {task.name} on {base.name}\n\n"
        f"Exported from run {opened.folder.name}: method {recipe.adapter.method}, of which one task "
        "is exactly an ordinary LoRA. lora_alpha / r is 1; the method's own scale is in B.\n\n"
        f"Checked after writing, loaded with PEFT, on {comparison.examples} held-out rows against "
        f"the run: largest difference of log-probabilities {comparison.largest:.2e}, equal answers "
        f"{comparison.equal:.1%}.\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base.name}")\n'
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")\n'
        "```\n\n"
        f"Prompt (Jinja, over the fields of a row):\n\n```\n{task.template.prompt.rstrip()}\n```\n"
    )
