"""One of the two processes that test_families.py looks at: a run of each family under ZeRO-3.

RANK=… WORLD_SIZE=2 … python families_worker.py RECIPE FOLDER NAME…
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoConfig

from mtl_lora_cli.engine.families import plan_of
from mtl_lora_cli.machine.processes import joined
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.run import start

# A constant rate: the first steps of a long run are those of a short one.
COMMON = (
    "adapter.dropout=0",
    "training.max_steps=4",
    "training.row_length=64",
    "training.schedule=constant",
    "training.warmup=0",
    "training.checkpoint_every=2",
)
# Of mixtures, whose experts learn, too.
EXPERTS = {"gpt_oss": "each", "mixtral-window": "shared", "qwen3_5_moe_text-delta-nets": "shared"}
# A file beside the recipe: what lets DeepSpeed cut so small a model at all.
CUT = ("distributed.zero_stage=3", "distributed.deepspeed=small.json")


def overrides(folder: Path, name: str) -> list[str]:
    """Of the run of one family: its model lies in FOLDER/model-NAME."""
    model = folder / f"model-{name}"
    targets = ", ".join(plan_of(AutoConfig.from_pretrained(model)).projections)
    experts = f"adapter.experts={EXPERTS.get(name, 'none')}"
    return [*COMMON, f"base_model={model}", f"adapter.target_modules=[{targets}]", experts]


def main(recipe: Path, folder: Path, names: list[str]) -> None:
    with joined() as processes:
        for name in names:
            loaded = load_recipe(recipe, [*overrides(folder, name), *CUT])
            start(prepare(loaded, processes), folder / f"zero-{name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
