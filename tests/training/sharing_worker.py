"""One of two processes with shared beginnings, under each stage of ZeRO.

RANK=… WORLD_SIZE=2 … python sharing_worker.py RECIPE FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from mtl_lora_cli.machine.processes import joined
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.run import start

ON = (
    "training.share_beginnings=true",
    "adapter.dropout=0",
    "training.row_length=512",
    "training.rows_per_step=3",
    "training.max_steps=4",
)
CUT = ("distributed.zero_stage=3", "distributed.deepspeed=small.json")
CASES = {
    "alike-0": (),
    "alike-2": ("distributed.zero_stage=2",),
    "alike-3": CUT,
    "nf4-2": ("quantization=nf4", "distributed.zero_stage=2"),
}

if __name__ == "__main__":
    recipe, folder = map(Path, sys.argv[1:])
    with joined() as processes:
        for name, overrides in CASES.items():
            start(prepare(load_recipe(recipe, [*ON, *overrides]), processes), folder / name)
